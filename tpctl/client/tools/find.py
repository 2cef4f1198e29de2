"""Which form a model's calls have, by its chat template and the tokens it adds; a model's name says nothing."""

from __future__ import annotations

from collections.abc import Mapping

from tpctl.client.tools.deepseek import DEEPSEEK, KIMI, Blocks
from tpctl.client.tools.forms import ToolForm
from tpctl.client.tools.gemma import Gemma
from tpctl.client.tools.harmony import HarmonyCalls
from tpctl.client.tools.hermes import Hermes
from tpctl.client.tools.llama import Llama
from tpctl.client.tools.mistral import Mistral
from tpctl.client.tools.tagged import MINIMAX, QWEN_XML, SEED, Keyed

KNOWN = "hermes, qwen-xml, seed, minimax, glm, llama, mistral, harmony, deepseek, kimi and gemma"


def find_form(template: str, added: Mapping[str, int]) -> ToolForm | None:
    """The form that a template writes calls in, or ``None`` if that is none of those known.

    Args:
        template: source of the chat template.
        added: ids of the tokens that the tokenizer adds to the vocabulary, by their text.
    """
    if "<|channel|>" in template and "functions." in template and "<|message|>" in added:
        return HarmonyCalls()
    if DEEPSEEK[2] in template:
        return Blocks("deepseek", DEEPSEEK, typed="```json" in template)
    if KIMI[2] in template:
        return Blocks("kimi", KIMI, numbered=True)
    if "<|tool_call>" in template:
        return Gemma()
    if "[TOOL_CALLS]" in template:
        return Mistral(named="[ARGS]" in template)
    for tagged in (MINIMAX, SEED):
        if tagged.block[0] in template:
            return tagged
    if "<function=" in template and "<parameter=" in template:
        return QWEN_XML
    if "<arg_key>" in template:
        return Keyed()
    if "<tool_call>" in template:
        return Hermes()
    if '"parameters": ' in template and ("<|python_tag|>" in template or "<|python_tag|>" in added):
        return Llama()
    return None

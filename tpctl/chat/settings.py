"""``/set``: sampling options by name, as they are typed and as they are shown."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from tpctl.client.conversation import Conversation
from tpctl.client.tokenizer import check_text
from tpctl.errors import RequestError, shown
from tpctl.wire.guide import NAMES as GUIDES
from tpctl.wire.sampling import SamplingParams

_HIDDEN = ("logprobs", "prompt_logprobs", "logit_bias", "guide_after", "guide_name", *GUIDES)
"""What a chat does not show, and is not typed; ``--json-schema`` sets one of the last."""
NAMES = (*(field.name for field in fields(SamplingParams) if field.name not in _HIDDEN), "stop")
_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)} | {"max_tokens": None}
# What ollama and llama.cpp call the same.
_OTHER_NAMES = {"repeat_penalty": "repetition_penalty", "num_predict": "max_tokens", "n_predict": "max_tokens"}
_DEFAULT = "default"


def option(name: str) -> str:
    """The field that ``name`` stands for: ``--top-p``, ``top-p`` and ``top_p`` are one.

    Raises:
        RequestError: there is none.
    """
    found = name.lower().removeprefix("--").replace("-", "_")
    found = _OTHER_NAMES.get(found, found)
    if found not in NAMES:
        raise RequestError(f"there is no option {shown(name)}; /set shows all")
    return found


def change(conversation: Conversation, name: str, text: str) -> None:
    """Set an option to what was typed; "default" returns it to its default.

    Raises:
        RequestError: there is no such option, or the value is none for it.
    """
    name = option(name)
    if name == "stop":
        conversation.set_stop(_texts(text))
    else:
        conversation.set_sampling(name, None if text == _DEFAULT else _value(text))


def describe(conversation: Conversation, name: str) -> str:
    """An option and its value."""
    if name == "stop":
        value = json.dumps(conversation.stop, ensure_ascii=False) if conversation.stop else "none"
    elif name in conversation.sampling:
        value = _shown(conversation.sampling[name])
    elif _DEFAULTS[name] is None:
        value = "what the context holds" if name == "max_tokens" else "none"
    else:
        value = _shown(_DEFAULTS[name])
    return f"{name:<20} {value}"


def _shown(value: Any) -> str:
    return json.dumps(value) if value != () else "none"


def _value(text: str) -> Any:
    """A number, true, false or a list as JSON has them, else the text, which the option will refuse."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if value is None else value


def _texts(text: str) -> list[str]:
    """``"a"`` and ``["a", "b"]`` as JSON has them, else the text itself."""
    if text == _DEFAULT:
        return []
    value = _value(text)
    texts = value if isinstance(value, list) else [value if isinstance(value, str) else text]
    if not all(isinstance(one, str) and one for one in texts):
        raise RequestError(f'stop is {shown(value)}, but must be a text, or a list of texts like ["\\n", "END"]')
    for one in texts:
        check_text(one, "stop text")
    return texts

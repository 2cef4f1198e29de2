"""How a model marks what it thinks before it answers, by its chat template and the tokens it adds.

Most put it between two tags, which a template may open itself at the end of a prompt: ``<think>…</think>``. gpt-oss
writes messages on channels (harmony): ``<|channel|>analysis<|message|>…<|end|>``, then
``<|start|>assistant<|channel|>final<|message|>…``. Which one it is, if any, is not guessed by a model's name: a
template that renders earlier thoughts, or leaves them out, names the mark that ends them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tags:
    """Thoughts stand between two tags, at the beginning of an answer.

    Attributes:
        label: what follows the opening tag each time, and is no part of a thought.
        ids: of the two tags, where each is an added token; else they are found in the text.
        around: marks before and behind the answer itself, which are no part of it.
        around_ids: of those of them that are added tokens; others are text.
    """

    open: str
    close: str
    label: str = ""
    ids: tuple[int, int] | None = None
    around: tuple[str, ...] = ()
    around_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Harmony:
    """An answer is several messages, each with a header that names its channel; the ids of what marks them.

    https://cookbook.openai.com/articles/openai-harmony
    """

    start: int
    channel: int
    message: int
    end: int


Form = Tags | Harmony

_TAGS = (
    Tags("<think>", "</think>"),  # Qwen3, GLM-4.5, MiniMax-M2, DeepSeek-R1, SmolLM3
    Tags("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    Tags("<seed:think>", "</seed:think>"),
    Tags("<|channel>", "<channel|>", label="thought\n"),  # Gemma 4
    Tags("<|START_THINKING|>", "<|END_THINKING|>", around=("<|START_RESPONSE|>", "<|END_RESPONSE|>")),  # Command R7B, A
)
_HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")


def find_form(template: str, added: Mapping[str, int]) -> Form | None:
    """The form of a model's thoughts, or ``None`` if it has none.

    Args:
        template: source of its chat template.
        added: ids of the tokens that its tokenizer adds to the vocabulary, by their text.
    """
    if "<|channel|>" in template and all(mark in added for mark in _HARMONY):
        return Harmony(*(added[mark] for mark in _HARMONY))
    for tags in _TAGS:
        if tags.close in template:
            single = tags.open in added and tags.close in added
            ids = (added[tags.open], added[tags.close]) if single else None
            around = frozenset(added[mark] for mark in tags.around if mark in added)
            return replace(tags, ids=ids, around_ids=around)
    return None

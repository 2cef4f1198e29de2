"""By how much a ``tokenizer.json`` can lengthen a text: its steps are somebody else's, and nothing stops them.

Four replacements of "a" by a hundred make 300 MB of "aaa", in the command's own process. So what every step can do is
read from the file before the ``tokenizers`` library sees it, and refused where the steps together multiply beyond
``MOST_GROWTH``, which is more than the steps of real models could do to the worst of texts. What they make of a long
text in fact is measured before it is tokenised.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Any

from tpctl.errors import CheckpointError, RequestError, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_GROWTH = 10_000
"""Times, in bytes. " " to "▁" is 3; a charsmap, "▁" for runs of spaces and Metaspace, as T5 has them, are 792."""
MOST_DECODED = 64
"""The same for the text of a token."""
MOST_ADDED = 1000
"""Tokens put around a text; bytes put before each part of a text, and of what marks the parts of a word."""
LONGEST = 1 << 20
"""Bytes that a text may become however short it is; it may in any case become four times as long as it is."""
MOST_PARSED = 64 << 20
"""Bytes of a file that is read as Python's objects, which can take 25 times as many."""

_TOGETHER = 1 << 14  # characters that are measured at a time: other threads wait for that long

_UNICODE = 16
"""NFKC makes at most 11 bytes of one (U+FDFA), in lower case a half more; what has been taken apart stays so."""
_MOST_PREPENDED = 16  # they go before each part between two added tokens, which ``check_text_growth`` does not see

_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")
_MEMBER = re.compile(rb"\s*:\s*[^\s\d-]")  # what makes a name one of a step; in the vocabulary ids follow

_Step = Mapping[str, Any]


class _Unknown(Exception):
    """A step that is not understood."""


def read_steps(raw: bytes, file: str) -> dict[str, Any]:
    """The members of a ``tokenizer.json`` but for its model, which is nearly all of it and usually the last.

    Returns:
        empty where it is no JSON object: the library then refuses it, and says why.

    Raises:
        CheckpointError: its model stands elsewhere, and it is longer than ``MOST_PARSED``.
    """
    at = raw.find(b'"model"')
    # Closed behind its last comma it is an object only if ``at`` is between two members of the outermost one.
    head = {} if at < 0 or _has_later(raw, at) else _object(raw[:at].rstrip().removesuffix(b",") + b"}")
    if not head and len(raw) > MOST_PARSED:
        raise CheckpointError(
            f"{file} has {len(raw)} bytes, but one whose model is not its last member has at most {MOST_PARSED}"
        )
    return head or {name: value for name, value in _object(raw).items() if name != "model"}


def _has_later(raw: bytes, at: int) -> bool:
    """Whether another of the steps may stand behind ``at``, or letters written as escapes, among which one could hide.

    Looks for texts, not for a pattern, which takes a second where the vocabulary is large.
    """
    names = (b'"%b"' % name.encode() for name in _STEPS)
    if any(_MEMBER.match(raw, place + len(name)) for name in names for place in _places(raw, name, at)):
        return True
    return any(raw[place + 4 : place + 5] in _SIGNS and _escapes(raw, place) for place in _places(raw, b"\\u00", at))


_SIGNS = tuple(b"%d" % digit for digit in range(2, 8))
"""First digits of printed ASCII."""


def _escapes(raw: bytes, place: int) -> bool:
    """Whether the backslash at ``place`` is none that another one writes."""
    first = place
    while raw[first - 1 : first] == b"\\":
        first -= 1
    return (place - first) % 2 == 0


def _places(raw: bytes, text: bytes, at: int) -> Iterator[int]:
    while (at := raw.find(text, at)) >= 0:
        yield at
        at += 1


def check_steps(steps: Mapping[str, Any], file: str) -> float:
    """Refuse steps that lengthen a text beyond measure.

    Returns:
        how many times as many bytes as a text has its pieces can have.

    Raises:
        CheckpointError: they multiply by more than ``MOST_GROWTH``, or one is of a kind that is not known here.
    """
    try:
        growth = _checked(steps, file)
    except (_Unknown, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if not _library_reads(steps):
            return 1.0  # and says why, when it reads the whole file
        why = str(error) if isinstance(error, _Unknown) else "a step that is not understood"
        raise CheckpointError(f"{file} has {why}; this version cannot tell what it makes of a text") from None
    return growth


def most_added(growth: float) -> int:
    """Bytes of an added token. The library puts them through the normalizer when it adds them."""
    return int(16 * LONGEST / growth)


def check_text_growth(backend: Tokenizer, text: str, growth: float, file: str) -> None:
    """Refuse a text that becomes a much longer one.

    Args:
        growth: as ``check_steps`` gives it.

    Raises:
        RequestError: it becomes more than ``LONGEST`` bytes and four times its own.
    """
    size = len(text.encode())
    if size * min(growth, size) <= LONGEST:
        return
    most, found = LONGEST + 4 * size, 0
    step = max(1, min(_TOGETHER, int(LONGEST / (4 * growth))))  # characters measured at a time
    for begin in range(0, len(text), step):
        part = text[begin : begin + step]
        if backend.normalizer is not None:
            part = backend.normalizer.normalize_str(part)
        pieces = (
            [part] if backend.pre_tokenizer is None else [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(part)]
        )
        found += sum(len(piece.encode()) for piece in pieces)
        if found > most:
            raise RequestError(f"{file} makes more than {most:,} bytes of a text of {size:,}; shorten the text")


def _checked(steps: Mapping[str, Any], file: str) -> float:
    normalized, split = (
        _product(list(_flat(steps.get(name), name)), kinds, name)
        for name, kinds in (("normalizer", _NORMALIZERS), ("pre_tokenizer", _PRE_TOKENIZERS))
    )
    if (growth := normalized * split) > MOST_GROWTH:
        which = "its normalizer and its pre_tokenizer together"
        if max(normalized, split) > MOST_GROWTH:
            which = "its normalizer" if normalized > MOST_GROWTH else "its pre_tokenizer"
            growth = normalized if normalized > MOST_GROWTH else split
        raise CheckpointError(
            f"{file}: {which} can lengthen a text {_times(growth)}, but at most {MOST_GROWTH}-fold is read"
        )
    decoded = _product(list(_flat(steps.get("decoder"), "decoder")), _DECODERS, "decoder")
    if decoded > MOST_DECODED:
        raise CheckpointError(
            f"{file}: its decoder can lengthen a token's text {_times(decoded)},"
            f" but at most {MOST_DECODED}-fold is read"
        )
    _check_around(list(_flat(steps.get("post_processor"), "post_processor")), file)
    _check_prepended(list(_flat(steps.get("normalizer"), "normalizer")), file)
    longest = max((len(token["content"].encode()) for token in steps.get("added_tokens") or []), default=0)
    if longest > (most := most_added(growth)):
        raise CheckpointError(f"{file} adds a token of {longest:,} bytes, but at most {most:,} are read")
    return growth


def _times(factor: float) -> str:
    return f"{factor:,.0f}-fold" if factor < 1e15 else f"{factor:.0e}-fold"


def _flat(step: _Step | None, name: str) -> Iterator[_Step]:
    """The steps of which one is made."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    inner = {"pre_tokenizer": "pretokenizers", "post_processor": "processors"}.get(name, f"{name}s")
    for one in step[inner]:
        yield from _flat(one, name)


def _product(steps: list[_Step], kinds: Mapping[str, Callable[[_Step], float]], name: str) -> float:
    for step in steps:
        if step["type"] not in kinds:
            raise _Unknown(f"a {name} of type {shown(step['type'])}")
    factors = 1.0
    for unicode, run in groupby(steps, lambda step: kinds[step["type"]] is _unicode):
        factors *= _UNICODE if unicode else prod(kinds[step["type"]](step) for step in run)
    return factors


def _check_around(steps: list[_Step], file: str) -> None:
    added = 0
    for step in steps:
        if step["type"] not in ("TemplateProcessing", "BertProcessing", "RobertaProcessing", "ByteLevel"):
            raise _Unknown(f"a post_processor of type {shown(step['type'])}")
        if step["type"] != "TemplateProcessing":
            added += 2 if step["type"] != "ByteLevel" else 0
            continue
        pieces = [list(piece.items())[0] for piece in step["single"]]  # noqa: RUF015 (an empty one is an IndexError)
        texts = sum(kind == "Sequence" for kind, _ in pieces)
        if texts > 1:
            raise CheckpointError(f"{file}: its post_processor writes a text {texts} times, but a prompt has it once")
        ids = step["special_tokens"]
        added += sum(len(ids[piece["id"]]["ids"]) for kind, piece in pieces if kind == "SpecialToken")
    if added > MOST_ADDED:
        raise CheckpointError(
            f"{file}: its post_processor puts {added:,} tokens around a text, but at most {MOST_ADDED:,} are read"
        )


def _check_prepended(steps: list[_Step], file: str) -> None:
    for step in steps:
        if step["type"] == "Prepend" and (size := len(step["prepend"].encode())) > _MOST_PREPENDED:
            raise CheckpointError(
                f"{file}: its normalizer puts {size:,} bytes before a text, but at most {_MOST_PREPENDED} are read"
            )


def _replace(step: _Step) -> float:
    kind, pattern = list(step["pattern"].items())[0]  # noqa: RUF015
    size = len(step["content"].encode())
    if kind == "String" and pattern:
        return max(1.0, size / len(pattern.encode()))
    return 1.0 + size  # it may match nothing, and so between any two characters


def _prepend(step: _Step) -> float:
    return 1.0 + len(step["prepend"].encode())


def _unicode(step: _Step) -> float:
    return float(_UNICODE)


def _charsmap(step: _Step) -> float:
    """Of a table of replacements, as sentencepiece writes it: a trie of 4 + N bytes, and texts ended by zeros."""
    raw = base64.b64decode(step["precompiled_charsmap"] or "")
    return max(1.0, *map(len, raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")))


def _byte_level(step: _Step) -> float:
    return 4.0 if step.get("add_prefix_space") else 2.0  # a space, of two bytes, before each piece


def _metaspace(step: _Step) -> float:
    return 2.0 * len(step["replacement"].encode())


def _nothing(step: _Step) -> float:
    return 1.0


def _decoded_prefix(step: _Step) -> float:
    return 2.0


_NORMALIZERS: dict[str, Callable[[_Step], float]] = {
    "Replace": _replace,
    "Prepend": _prepend,
    "ByteLevel": lambda step: 2.0,
    "Strip": _nothing,
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "BertNormalizer"), _unicode),
    "Precompiled": _charsmap,
}
_PRE_TOKENIZERS: dict[str, Callable[[_Step], float]] = {
    "ByteLevel": _byte_level,
    "Metaspace": _metaspace,
    **dict.fromkeys(
        (
            *("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Delimiter", "CharDelimiterSplit", "Split"),
            *("Punctuation", "Digits", "UnicodeScripts", "FixedLength", "RandomChunkSplit"),
        ),
        _nothing,
    ),
}
_DECODERS: dict[str, Callable[[_Step], float]] = {
    "Replace": _replace,
    **dict.fromkeys(("BPEDecoder", "WordPiece", "CTC", "Metaspace"), _decoded_prefix),  # a space for a mark or none
    **dict.fromkeys(("ByteLevel", "ByteFallback", "Fuse", "Strip"), _nothing),
}


def _object(raw: bytes) -> dict[str, Any]:
    try:
        # Reads all that serde_json reads, to which long whole numbers are floats too.
        found = json.loads(raw, parse_int=lambda digits: int(digits) if len(digits) < 100 else float(digits))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _library_reads(steps: Mapping[str, Any]) -> bool:
    from tokenizers import Tokenizer

    from tpctl.client.panics import guarded

    model = {"type": "BPE", "vocab": {}, "merges": []}
    try:
        guarded(
            lambda: Tokenizer.from_str(json.dumps({**steps, "version": "1.0", "added_tokens": [], "model": model})),
            CheckpointError,
        )
    except CheckpointError:
        return False
    return True

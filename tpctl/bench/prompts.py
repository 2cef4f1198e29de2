"""What ``tpctl bench serve`` asks: made prompts of known lengths, or those of a file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tpctl.bench.workload import make_workload
from tpctl.errors import SourceError, UsageError, shown
from tpctl.json_file import TwoMeanings, one_meaning

_TEXT = (
    "time people year way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change reason research girl "
    "moment air teacher force education foot boy age policy music market sense nation plan college interest death "
    "experience effect use class control field development role rate heart drug show leader light voice wife mind "
    "price report decision son view relationship town road arm difference value building action season tax director "
    "position player record paper space ground form event official matter center site project base activity star "
    "table court oil cost industry figure street image phone data picture practice piece land product doctor wall "
    "patient worker news test movie north love step tree source hair century evidence window culture brother energy "
    "period course summer plant term letter condition choice rule daughter south floor material population call "
    "hospital church risk fire future bank west board subject rest behavior performance top goal bed order author "
    "blood agency nature color store sound movement page race series language response animal factor article east "
    "artist scene stock treatment size film fight skill glass sea"
)
WORDS = tuple(_TEXT.split())
"""So common that nearly every vocabulary has each as one token, with a space before it and without: a text of N of them
has N tokens, beside what a server puts before it."""

LEAST_ID, MOST_ID = 3, 10_000
"""Ids of random tokens: every model has them, and the first few mean something else."""

_MOST_LINE = 64 << 20  # bytes


@dataclass(frozen=True)
class Shape:
    """Made prompts: lengths in tokens.

    Attributes:
        spread: a length is drawn evenly from (1 - spread) to (1 + spread) times what is asked for.
        prefix: tokens that come before those of ``prompt``, of ``prefixes`` different ones.
        ids: prompts are token ids and not texts.
    """

    prompt: int = 512
    output: int = 128
    spread: float = 0.0
    prefix: int = 0
    prefixes: int = 1
    ids: bool = False


def random_prompts(count: int, shape: Shape, seed: int) -> list[dict[str, Any]]:
    """Fields of ``count`` requests; the same ``seed`` gives the same ones. Two seeds share no beginnings of prompts."""
    rng = random.Random(seed)

    def length(mean: int) -> int:
        low, high = round(mean * (1 - shape.spread)), round(mean * (1 + shape.spread))
        return rng.randint(max(1, low), max(1, high))

    heads = [_tokens(rng, shape.prefix, shape.ids) for _ in range(shape.prefixes)] if shape.prefix else [[]]
    found = []
    for _ in range(count):
        tokens = rng.choice(heads) + _tokens(rng, length(shape.prompt), shape.ids)
        found.append({"prompt": _prompt(tokens), "max_tokens": length(shape.output)})
    return found


def named_prompts(name: str, count: int | None, seed: int, *, ids: bool) -> list[dict[str, Any]]:
    """Requests of ``bench throughput``'s workload ``name``: its tokens, or a word for each.

    Raises:
        UsageError: there is no such workload, or it has not so many prompts.
    """
    requests = make_workload(name, MOST_ID + 1, 13 * seed).requests
    if count is not None and count > len(requests):
        raise UsageError(f"--num-prompts is {count}, but {name} has {len(requests)} prompts; leave it out")
    found = []
    for request in requests[:count]:
        tokens = [token if ids else WORDS[token % len(WORDS)] for token in request.token_ids]
        fields = {"max_tokens": request.sampling.max_tokens, "temperature": request.sampling.temperature}
        found.append({"prompt": _prompt(tokens), **fields})
    return found


def file_prompts(file: Path, count: int | None, *, chat: bool) -> list[dict[str, Any]]:
    """The requests of a file's lines, JSON objects with ``prompt`` or ``messages``, as ``batch`` takes them.

    What else a line holds is sent with it; ``id`` is not.

    Raises:
        SourceError: the file cannot be read, or a line is no request; the message has its number.
        UsageError: it has fewer than ``count``.
    """
    try:
        with file.open("rb") as stream:
            found = list(islice(_lines(stream, file, chat), count))
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}") from None
    if not found:
        raise SourceError(f"{file} has no prompts; each line is to be a JSON object with prompt or messages")
    if count is not None and len(found) < count:
        raise UsageError(f"--num-prompts is {count}, but {file} has {len(found)} prompts; leave it out")
    return found


def _lines(stream: Any, file: Path, chat: bool) -> Iterator[dict[str, Any]]:
    number = 0
    while raw := stream.readline(_MOST_LINE + 1):
        number += 1
        if len(raw) > _MOST_LINE:
            raise SourceError(f"{file}: line {number} has more than {_MOST_LINE} bytes")
        if not raw.strip():
            continue
        try:
            fields = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=one_meaning)
        except TwoMeanings as error:
            raise SourceError(f"{file}: line {number}: {error}") from None
        except (ValueError, RecursionError):
            raise SourceError(f"{file}: line {number} is not valid JSON in UTF-8") from None
        if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
            raise SourceError(
                f"{file}: line {number} is {shown(fields)}, but must be an object with prompt or messages"
            )
        fields.pop("id", None)
        try:
            body = as_body(fields, chat=chat)
        except UsageError as error:
            raise SourceError(f"{file}: line {number}: {error}") from None
        yield body


def as_body(fields: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """``fields`` as the endpoint takes them.

    Raises:
        UsageError: it takes no such prompt.
    """
    body = dict(fields)
    if chat and "prompt" in body:
        if not isinstance(text := body.pop("prompt"), str):
            raise UsageError("--endpoint chat takes texts and messages, and no token ids; use --endpoint completions")
        body["messages"] = [{"role": "user", "content": text}]
    elif not chat and "messages" in body:
        raise UsageError("--endpoint completions takes no messages; use --endpoint chat")
    return body


def _tokens(rng: random.Random, count: int, ids: bool) -> list[Any]:
    return [rng.randrange(LEAST_ID, MOST_ID) if ids else rng.choice(WORDS) for _ in range(count)]


def _prompt(tokens: Sequence[Any]) -> str | list[int]:
    return " ".join(tokens) if isinstance(tokens[0], str) else list(tokens)

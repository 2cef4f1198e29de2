"""What ``tpctl bench quality`` measures: a text's perplexity, and how far one model's distributions are from another's.

The text's windows go through the engine as prompts do; the workers score their tokens (``wire.scoring``). Of two models
the one that is compared with runs first, and its distributions wait in a file: memory holds one model at a time, and
what it takes beside does not grow with the text.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpctl.arch.config import ModelConfig
from tpctl.bench.windows import Windows
from tpctl.checkpoint.cache import cache_root
from tpctl.client.engine_client import EngineClient
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import CheckpointError, EngineError, OutputError, RequestError, format_bytes
from tpctl.wire.messages import Output, Request
from tpctl.wire.report import EngineInfo
from tpctl.wire.sampling import SamplingParams
from tpctl.wire.scoring import Scoring
from tpctl.wire.settings import EngineConfig

_AHEAD = 2  # windows handed in, for each that is computed at once
_VALUE = 4  # bytes of a log-probability in a file


@dataclass(frozen=True)
class Distribution:
    """Statistics of many values; ``p99`` is the least that 99 of 100 do not exceed."""

    mean: float
    median: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution:
        ordered, count = sorted(values), len(values)
        middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
        return cls(math.fsum(ordered) / count, middle, ordered[math.ceil(0.99 * count) - 1], ordered[-1])


@dataclass(frozen=True)
class Scored:
    """What a model made of a text's tokens: natural logarithms, and where it was compared, divergences in nats and how
    many likeliest tokens were the same."""

    engine: EngineInfo
    logprobs: Sequence[float]
    divergences: Sequence[float]
    same_top: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token; infinite where that is beyond a float."""
        mean = -math.fsum(self.logprobs) / len(self.logprobs)
        return math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf


@dataclass(frozen=True)
class Quality:
    """A model's figures on a text, and beside another one's.

    Attributes:
        tokens: that were scored.
        divergence: KL(P || Q) in nats at each of them, P of ``against`` and Q of the model.
        same_top: share of them for which both have the same likeliest token.
    """

    tokens: int
    perplexity: float
    engine: EngineInfo
    against_perplexity: float | None = None
    against_engine: EngineInfo | None = None
    divergence: Distribution | None = None
    same_top: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def tokens_of(config: EngineConfig, text: str, most: int | None = None) -> tuple[list[int], list[int]]:
    """What the model's tokenizer puts before every text, and the tokens of this one, ``most`` of them at most.

    Raises:
        RequestError: the tokenizer fails on it.
    """
    tokenizer = Tokenizer(config.text_dir)
    ids = tokenizer.encode(text)
    bos = tokenizer.special_tokens.get("bos_token")
    prefix = ids[:1] if bos is not None and ids[:1] == [tokenizer.backend.token_to_id(bos)] else []
    return prefix, ids[len(prefix) :][:most]


def check_alike(folder: Path, against: Path, names: Iterable[str]) -> None:
    """Refuse to compare models whose distributions are over different tokens.

    Args:
        folder, against: where configs and tokenizers are.
        names: what messages call both.

    Raises:
        CheckpointError: their vocabularies differ.
    """
    sizes = [ModelConfig.load(one).vocab_size for one in (folder, against)]
    both = f"{' and '.join(names)} cannot be compared:"
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{both} the one knows {sizes[0]} tokens, the other {sizes[1]}; take two forms of one model"
        )
    own, other = (Tokenizer(one).backend.get_vocab(with_added_tokens=True) for one in (folder, against))
    if own != other:
        wrong = min(own.items() ^ other.items(), key=lambda pair: (pair[1], pair[0]))[1]
        raise CheckpointError(
            f"{both} their tokenizers differ, for one at the token id {wrong}; take two forms of one model"
        )


def quality(
    config: EngineConfig,
    windows: Windows,
    against: EngineConfig | None = None,
    running: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Quality:
    """Score a text with a model, and where ``against`` is given, compare with that.

    Args:
        running: what holds while one of both runs, "model" or "against".

    Raises:
        OutputError: the distributions of ``against`` do not fit the disk.
        RequestError, EngineError: the workers failed, or what they computed is not finite.
    """
    if against is None:
        with running("model"):
            own = _score(config, windows, {})
        return Quality(windows.count, own.perplexity, own.engine)
    vocab_size = ModelConfig.load(config.text_dir).vocab_size
    with _kept(windows.count, vocab_size) as file:
        with running("against"):
            other = _score(against, windows, {"keep": file, "rows": windows.count})
        with running("model"):
            own = _score(config, windows, {"against": file, "rows": windows.count})
    return Quality(
        windows.count,
        own.perplexity,
        own.engine,
        other.perplexity,
        other.engine,
        Distribution.of(own.divergences),
        own.same_top / windows.count,
    )


def _score(config: EngineConfig, windows: Windows, scoring: Mapping[str, Any]) -> Scored:
    """All windows through one engine, as many at a time as it computes together."""
    logprobs, divergences = (array("d", bytes(8 * windows.count)) for _ in range(2))
    rows: dict[str, int] = {}
    same, left = 0, iter(windows)
    with EngineClient(config) as client, client.mailbox() as mailbox:
        info = client.wait_ready()
        more = True
        while more or rows:
            while more and len(rows) < _AHEAD * info.max_num_seqs:
                if more := (window := next(left, None)) is not None:
                    id, params = str(window.row), SamplingParams(max_tokens=1, ignore_eos=True)
                    rows[id] = window.row
                    mailbox.submit(
                        [Request(id, window.token_ids, params, Scoring(window.first, window.row, **scoring))]
                    )
            for output in mailbox.outputs() if rows else ():
                row = rows.pop(output.id)
                for at, score in enumerate(_checked(output, row), start=row):
                    logprobs[at] = score.logprob
                    # Never negative but by rounding.
                    divergences[at] = max(0.0, score.divergence or 0.0)
                    same += bool(score.same_top)
    return Scored(info, logprobs, divergences, same)


def _checked(output: Output, row: int) -> Sequence[Any]:
    if output.finish_reason == "error":
        raise RequestError(output.message or "the engine refused a part of the text")
    scores = output.scores or []
    for at, score in enumerate(scores, start=row):
        if not (math.isfinite(score.logprob) and math.isfinite(score.divergence or 0.0)):
            raise EngineError(
                f"what the model makes of token {at} is not finite: its weights, or what --dtype computes from them, "
                "hold NaN or infinity; check the checkpoint, or try --dtype float32"
            )
    return scores


@contextmanager
def _kept(rows: int, vocab_size: int) -> Iterator[str]:
    """A file for so many distributions, in the cache's folder, as the workers of this process may open it. It has no
    name there, so that nothing is left of it, however the process ends.

    Raises:
        OutputError: the disk has no room for it.
    """
    folder, size = cache_root(), rows * vocab_size * _VALUE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 — closed below
    except OSError as error:
        raise _no_room(folder, error) from None
    with file:
        if size > free:
            raise OutputError(
                f"the distributions of {rows:,} tokens over {vocab_size:,} take {format_bytes(size)}, but the disk of "
                f"{folder} has {format_bytes(free)} free; give fewer --tokens, or set TPCTL_CACHE"
            )
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a worker that finds the disk full could not say so
        except OSError as error:
            raise _no_room(folder, error) from None
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _no_room(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot keep distributions in {folder}: {error.strerror or error}; set TPCTL_CACHE")

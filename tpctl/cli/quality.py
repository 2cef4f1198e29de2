"""``tpctl bench quality``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpctl.cli.console import note, print_json, stdout
from tpctl.cli.engine import prepare
from tpctl.cli.options import MODEL_HELP, DType, EngineOptions, KvCacheDType, grouped
from tpctl.errors import SourceError, TpctlError, UsageError

if TYPE_CHECKING:
    from tpctl.bench.quality import Quality
    from tpctl.wire.settings import EngineConfig

CONTEXT = 2048
"""Tokens of a window, where nothing else is asked for and the model takes as many."""

_OWN = re.compile(r"(?<![\w-])--(?=(tp|ep|dtype|kv-cache-dtype)(?![\w-]))")
"""Where options begin of which the model compared with has its own."""

_MOST_TEXT = 64 << 20  # bytes
_SEQS = 4  # windows computed together: they are long


@grouped
def quality(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "demo",
    against: Annotated[
        str | None, typer.Option(help="Model to compare with, as the unquantised form. Default: MODEL.")
    ] = None,
    against_tp: Annotated[int | None, typer.Option(min=1, help="Its tensor-parallel size. Default: --tp.")] = None,
    against_ep: Annotated[
        int | None, typer.Option(min=1, help="Groups of ranks that its experts are dealt to. Default: as of MODEL.")
    ] = None,
    against_dtype: Annotated[DType | None, typer.Option(help="Its dtype. Default: --dtype.")] = None,
    against_kv_cache_dtype: Annotated[
        KvCacheDType | None, typer.Option(help="Its KV cache. Default: --kv-cache-dtype.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text in UTF-8. Default: one of this package.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Take so many tokens of the text at most.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help=f"Tokens of a window. Default: {CONTEXT}, or what the model takes.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between the beginnings of windows. Default: half a window.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Perplexity of a text, and how far a model's distributions are from those of another form of it.

    With --against, or another option that begins so: the Kullback-Leibler divergence KL(P || Q) in nats at every
    token, P of the model compared with and Q of MODEL, and how often both have the same likeliest token. One model runs
    after the other; P's distributions wait in a file (4 bytes a token of the text and of the vocabulary).
    """
    from tpctl.bench.quality import check_alike, tokens_of
    from tpctl.bench.quality import quality as measured
    from tpctl.bench.windows import Windows

    passage = _read(text)
    options = replace(engine, max_num_seqs=engine.max_num_seqs or _SEQS, enforce_eager=True)
    names = {"model": model, "against": against or model}

    @contextmanager
    def running(who: str) -> Iterator[None]:
        note(f"running {names[who]}")
        with _of_other(against) if who == "against" else nullcontext():
            yield

    config, other = prepare(model, options), None
    if any(one is not None for one in (against, against_tp, against_ep, against_dtype, against_kv_cache_dtype)):
        theirs = replace(
            options,
            tp=against_tp or engine.tp,
            ep=against_ep or engine.ep,
            expert_parallel=engine.expert_parallel and against_ep is None,
            dtype=against_dtype or engine.dtype,
            kv_cache_dtype=against_kv_cache_dtype or engine.kv_cache_dtype,
        )
        own = config.text_dir
        with _of_other(against):
            other = prepare(
                names["against"], theirs, look=lambda source: check_alike(own, source.folder, names.values())
            )
    prefix, ids = tokens_of(config, passage, tokens)
    configs = {model: config} if other is None else {names["against"]: other, model: config}
    size = _context(context, engine.max_model_len, configs)
    windows = Windows(prefix, ids, size, stride or max(1, size // 2))
    # Engines that take windows and nothing longer, so that their KV caches are no larger.
    config, other = replace(config, max_model_len=size + 1), other and replace(other, max_model_len=size + 1)
    result = measured(config, windows, other, running=running)
    asked = {"text": None if text is None else str(text), "context": size, "stride": windows.stride, "tokens": tokens}
    if as_json:
        from tpctl.bench.measure import machine

        compared = {} if other is None else {"against": names["against"]}
        report = {"benchmark": "quality", "model": model, **compared, **result.to_dict()}
        print_json({**report, "machine": machine(), "settings": asked})
        return
    _print(result, model, names["against"], asked)


def _read(file: Path | None) -> str:
    """The text of ``file``, or the package's own.

    Raises:
        SourceError: it cannot be read, is longer than ``_MOST_TEXT``, or not UTF-8.
    """
    from tpctl.bench.passage import PASSAGE

    if file is None:
        return PASSAGE
    try:
        if (size := file.stat().st_size) > _MOST_TEXT:
            raise SourceError(f"{file} has {size} bytes, but a text at most {_MOST_TEXT}; give a part of it")
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{file} is not UTF-8 (byte {error.start + 1}); convert it") from None


@contextmanager
def _of_other(name: str | None) -> Iterator[None]:
    """Errors of the model compared with: they name its options, and where it is not MODEL, it as ``name``."""
    try:
        yield
    except TpctlError as error:
        said = "`".join(
            part if at % 2 else _OWN.sub("--against-", part) for at, part in enumerate(str(error).split("`"))
        )
        said = said.replace("leave --against-ep and --expert-parallel out", "use --against-ep 1")
        error.args = (said if name is None or name in said else f"{name}: {said}",)
        raise


def _context(asked: int | None, limit: int | None, configs: Mapping[str, EngineConfig]) -> int:
    """Tokens of a window that every model takes, and one that it answers with.

    Args:
        configs: by the names of the models.

    Raises:
        UsageError: one takes fewer than ``asked``.
    """
    from tpctl.arch.config import ModelConfig

    limits = {name: ModelConfig.load(one.text_dir).max_position_embeddings for name, one in configs.items()}
    least = min(limits, key=lambda name: limits[name])
    most = min(limits[least], limit or limits[least]) - 1
    if asked is not None and asked > most:
        what = "--max-model-len" if limit is not None and limit <= limits[least] else f"the limit of {least}"
        raise UsageError(f"--context {asked} is more than {most}, one less than {what}; lower it")
    return asked or min(CONTEXT, most)


def _print(result: Quality, model: str, against: str, asked: Mapping[str, object]) -> None:
    from rich.table import Table

    what = asked["text"] or "the package's own text"
    console = stdout()
    console.print(
        f"{result.tokens:,} tokens of {what}, windows of {asked['context']}, stride {asked['stride']}", soft_wrap=True
    )
    table = Table(box=None, pad_edge=False)
    for name, left in (("", True), ("tp", False), ("dtype", True), ("KV cache", True), ("perplexity", False)):
        table.add_column(name, justify="left" if left else "right")
    rows = [(model, result.engine, result.perplexity)]
    if result.against_engine is not None and result.against_perplexity is not None:
        rows.append((f"against {against}", result.against_engine, result.against_perplexity))
    for name, info, perplexity in rows:
        table.add_row(name, str(info.tp_size), info.dtype, info.kv_cache_dtype, f"{perplexity:.4f}")
    console.print(table)
    if result.divergence is None or result.same_top is None:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("", "mean", "median", "99th percentile", "max"):
        table.add_column(name, justify="right" if name else "left")
    found = result.divergence
    table.add_row("KL, nats", *(f"{value:.3g}" for value in (found.mean, found.median, found.p99, found.max)))
    console.print(table)
    console.print(f"the same likeliest token at {result.same_top:.2%} of all places")

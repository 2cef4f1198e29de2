"""``tpctl bench throughput|latency|startup``, and ``quality`` and ``serve`` beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpctl.bench.shapes import SHAPES
from tpctl.cli.arguments import CheckedCommand
from tpctl.cli.bench_serve import bench_serve
from tpctl.cli.console import byte_progress, note, print_json, status
from tpctl.cli.engine import engine_args, prepare, say_context, say_policy
from tpctl.cli.options import (
    KV_FORMS,
    MODEL_HELP,
    POLICY,
    DistributionOptions,
    EngineOptions,
    SchedulingPolicy,
    grouped,
)
from tpctl.cli.quality import quality
from tpctl.errors import UsageError

if TYPE_CHECKING:
    from tpctl.bench.measure import Measured
    from tpctl.wire.settings import EngineConfig

bench = typer.Typer(
    help="Measure speed on a real model, or on random weights of a known shape; a server's; and a model's quality.",
    no_args_is_help=True,
)

Model = Annotated[str | None, typer.Argument(help=f"{MODEL_HELP} [default: demo]")]
Shape = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:LAYERS]",
        help=f"Random weights of this shape instead, or of its first layers: {', '.join(SHAPES)}.",
    ),
]
Runs = Annotated[int, typer.Option(min=1, help="Timed runs; the median is what to quote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


@grouped
def throughput(
    model: Model = None,
    shape: Shape = None,
    workload: Annotated[
        str,
        typer.Option(
            help="nano (256 prompts), short (32), prefix (256 that share 2,000 tokens), long (32 of 12,000) or even "
            "(512 of 1,024)."
        ),
    ] = "short",
    runs: Runs = 3,
    as_json: AsJson = False,
    scheduling_policy: Annotated[SchedulingPolicy | None, POLICY] = None,
    *,
    engine: EngineOptions,
    sampling: DistributionOptions,
) -> None:
    """Generated tokens a second of a whole workload, handed in at once, after a warm-up run.

    Sampling defaults to the workload's own: nano's temperature is 0.6, short is greedy. The scheduling policy is
    auto.
    """
    from tpctl.bench import measure

    sampling.check()
    config, name, vocab = _config(model, shape, engine, scheduling_policy or SchedulingPolicy.auto)
    with status(f"running {workload}"):
        measured = measure.throughput(config, workload, vocab, runs, sampling.given(), note)
    say_policy(scheduling_policy, measured.engine)
    say_context(measured.engine)
    settings = {"workload": workload, "sampling": sampling.given()}
    _print("throughput", name, config, measured, settings, as_json)


@grouped
def latency(
    model: Model = None,
    shape: Shape = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens after the first.")] = 256,
    sequences: Annotated[
        str, typer.Option(metavar="N,...", help="Requests at once, e.g. 1,8,64; of more than one, the time of a step.")
    ] = "1",
    runs: Runs = 3,
    as_json: AsJson = False,
    *,
    engine: EngineOptions,
    sampling: DistributionOptions,
) -> None:
    """Time to first token and time per token of a request, or a step's of several at once, after a warm-up.

    Greedy unless sampling options are given.
    """
    from tpctl.bench import measure

    sampling.check()
    counts = _counts(sequences)
    config, name, vocab = _config(model, shape, engine)
    with status("running requests"):
        measured = measure.latency(config, prompt_tokens, output_tokens, vocab, runs, sampling.given(), counts, note)
    settings = {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "sequences": counts,
        "sampling": sampling.given(),
    }
    _print("latency", name, config, measured, settings, as_json)


@grouped
def startup(
    model: Model = None,
    shape: Shape = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 128,
    runs: Runs = 3,
    as_json: AsJson = False,
    *,
    engine: EngineOptions,
) -> None:
    """From starting the workers, with the shards in the cache, to the first token.

    "before" is the command's own part: from its process' start until the workers are started, once, checks of the
    shards included.
    """
    from tpctl.bench import measure

    config, name, vocab = _config(model, shape, engine)
    with status("starting and stopping"):
        measured = measure.startup(config, prompt_tokens, vocab, runs, note)
    _print("startup", name, config, measured, {"prompt_tokens": prompt_tokens}, as_json)


bench.command("throughput", cls=CheckedCommand, short_help="Tokens a second of a whole workload.")(throughput)
bench.command("latency", cls=CheckedCommand, short_help="Time to first token, and per token.")(latency)
bench.command("startup", cls=CheckedCommand, short_help="Time from starting the workers to the first token.")(startup)
bench.command("serve", cls=CheckedCommand, short_help="A server's speed, as its clients see it.")(bench_serve)
bench.command("quality", cls=CheckedCommand, short_help="Perplexity, and divergence from another form.")(quality)


def _counts(text: str) -> list[int]:
    """The numbers of ``--sequences``."""
    try:
        counts = [int(one) for one in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise UsageError(f"--sequences {text} is no list of numbers from 1 on, as 1,8,64 is")
    return counts


def _config(
    model: str | None,
    shape: str | None,
    options: EngineOptions,
    policy: SchedulingPolicy = SchedulingPolicy.fcfs,
) -> tuple[EngineConfig, str, int]:
    """The engine's configuration, the model's name and how many tokens it knows."""
    from tpctl.arch.config import ModelConfig

    if shape is None:
        model = "demo" if model is None else model
        config = prepare(model, options, policy)
        return config, model, ModelConfig.load(config.text_dir).vocab_size
    if model is not None:
        raise UsageError(f"{model} and --shape {shape} are two models; give one of them")
    from tpctl.bench.synthetic import shape_config, synthetic_shards
    from tpctl.client.prepare import configure

    known, args = shape_config(shape), engine_args(options, policy)
    settings, tp_size = args.settle(), args.tp or 1
    settings.longest(known.max_position_embeddings)
    with status(f"making random weights of {shape}"):
        source = synthetic_shards(shape, tp_size, args.groups(tp_size) or 1)
    return configure(source, args, progress=byte_progress), shape, known.vocab_size


def _print(
    benchmark: str,
    model: str,
    config: EngineConfig,
    measured: Measured,
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    from tpctl.bench.measure import Report, machine

    asked, info = {**settings, "engine": config.to_dict()}, measured.engine
    report = Report(benchmark, model, measured.figures, info, machine(), asked, measured.stats)
    if as_json:
        print_json(report.to_dict())
        return
    gpus = report.machine["gpus"]
    where = f"{len(gpus)} x {gpus[0]}" if info.device == "cuda" and gpus else report.machine["cpu"]
    cache = f"  {KV_FORMS[info.kv_cache_dtype]}" if info.kv_cache_dtype in KV_FORMS else ""
    dealt = f"  ep {info.expert_parallel}" if info.expert_parallel > 1 else ""
    print(f"{model}  tp {info.tp_size}{dealt}  {info.dtype}  {info.attention_backend}{cache}  on {where}")
    for name, figure in measured.figures.items():
        low, high = figure.spread
        print(
            f"  {name:<12} {figure.median:10.2f} {figure.unit:<6} ({low:.2f} to {high:.2f}, {len(figure.values)} runs)"
        )

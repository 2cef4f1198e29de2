"""``tpctl batch``: answer every line of a JSONL file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from tpctl.cli.batch_formats import FormatOptions, Opened, opened_input, refuse_among_input
from tpctl.cli.batch_job import Job, JobOptions, is_job, run_job
from tpctl.cli.batch_report import end_if_finished, left_behind, progress, summary
from tpctl.cli.console import note, status
from tpctl.cli.engine import describe, interrupts, lend_ranks, prepare, say_context, say_nodes, say_policy
from tpctl.cli.options import (
    MODEL_HELP,
    POLICY,
    EngineOptions,
    NodeOptions,
    SamplingOptions,
    SchedulingPolicy,
    TemplateOptions,
    grouped,
)
from tpctl.cli.places import output_stream, refuse_own_input, target_of, writing
from tpctl.cli.template import TemplateAtHand, look_ahead
from tpctl.errors import UsageError

if TYPE_CHECKING:
    from tpctl.batch.formats.place import Reader
    from tpctl.client.batch import Tally
    from tpctl.client.engine_client import EngineClient
    from tpctl.client.results import Results
    from tpctl.launch.nodes import Nodes
    from tpctl.wire.report import EngineInfo, EngineStats

TOGETHER = 32
"""Lines of a file that are read at once, so that their conversations are rendered at the cost of one."""

DEFAULTS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 256, "seed": 0}


@grouped
def batch(
    prompts: Annotated[str, typer.Argument(help="JSONL or Parquet; - for stdin.")],
    output: Annotated[
        str, typer.Option("-o", "--output", help="JSONL or .parquet file, or FOLDER/ for parts; - for stdout.")
    ] = "-",
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT if it exists.")] = False,
    scheduling_policy: Annotated[SchedulingPolicy | None, POLICY] = None,
    *,
    engine: EngineOptions,
    node: NodeOptions,
    sampling: SamplingOptions,
    template: TemplateOptions,
    formats: FormatOptions,
    job: JobOptions,
) -> None:
    """Answer every line of a JSONL file: {"id"?, "prompt"} or {"id"?, "messages"}, with sampling fields.

    Or every row of a Parquet file, of a folder of them, of a 'pattern*.parquet', or of hf://datasets/…; or OpenAI batch
    lines, which are answered by lines of the same kind.

    Messages may hold whatever the model's chat template reads; "chat_template_kwargs" of a line adds to the option.

    One row a line comes out, in the order of the input: {"id", "text", "finish_reason", "prompt_tokens",
    "completion_tokens"}, or {"id", "error"} for a line that cannot be run; a "note" says where the context, and not
    "max_tokens", ended an answer. Where the chat template marks what a model thinks before it answers, "reasoning" has
    that, and "text" the answer alone; "stop" ends answers, not thoughts. A field that is null is not given. An id left
    out is the line number, which counts empty lines too; those get no row.

    By default answers are greedy (temperature 0) and at most 256 tokens long; line n without a seed gets
    --seed + n - 1. Until all rows are there they are kept in OUTPUT.partial; --resume goes on with that, and with
    --force as well may then replace an OUTPUT; an OUTPUT that is finished it leaves as it is. The exit code is 1 if any
    row is an error, 130 after Ctrl-C.

    The scheduling policy is auto if prompts and answers are files. Elsewhere somebody may wait for the first
    rows, so it is fcfs.

    With several --replicas the rows are made in parts, in OUTPUT.parts, and put together at the end. A FOLDER keeps
    them as they are: part-00000.jsonl and so on, manifest.json, stats.json. Whatever dies meanwhile, no row is lost,
    and none is there twice. `tpctl batch status OUTPUT` says how far it is (a file of prompts that is called status:
    ./status).

    --hosts has replicas run on other hosts, by ssh or within a SLURM job. A model that fits no host runs on several
    with --nnodes, --node-rank and --rdzv-endpoint: the same command on each, of which the first writes the rows.
    """
    sampling.check(DEFAULTS)
    nodes = node.nodes()
    parts = is_job(output, job)
    if nodes.count > 1 and parts:
        raise UsageError("--nnodes is for one engine, into one file; leave out --replicas, --hosts and FOLDER/")
    if nodes.rank > 0:
        lend_ranks(prepare(model, engine, nodes=nodes), nodes)
        return
    values, stop, asked = {**DEFAULTS, **sampling.given()}, sampling.stop or [], formats.asked()
    call = Job(prompts, output, model, resume, force, scheduling_policy, engine, values, stop, template, asked, job)
    if parts:
        run_job(call)
    else:
        _run_alone(call, nodes)


def _run_alone(job: Job, nodes: Nodes) -> None:
    """Answer every line with one engine.

    Raises:
        TpctlError: it cannot be begun, or not go on.
        typer.Exit: 1 if a row is an error, 130 if it was interrupted.
    """
    from tpctl.batch.formats.choose import choose
    from tpctl.client.results import Results, partial_of
    from tpctl.client.resume import check_target, remains, rows_left

    # Answers on a terminal show themselves.
    target, silent = target_of(job.output), job.output == "-" and sys.stdout.isatty()
    if job.resume and target is None:
        raise UsageError("--resume needs a file to go on with; name it with -o")
    refuse_own_input(job.prompts, job.output)
    if target is not None and not job.resume:
        check_target(target, force=job.force)
    spec = choose(job.prompts, job.output, job.asked, job.model)
    refuse_among_input(spec, job.output)
    if target is not None and job.resume and not job.force:
        end_if_finished(spec, target, partial_of(target))
    at_hand = TemplateAtHand(job.template)
    settings = {"model": job.model, "dtype": str(job.engine.dtype), "sampling": job.sampling, "stop": job.stop}
    settings |= {"template": at_hand.settings, "formats": job.asked.settings}
    with (
        opened_input(spec, job.asked, job.prompts, job.model, count=not silent) as given,
        Results(target, settings, resume=job.resume, force=job.force, encode=given.sink.encode) as results,
        output_stream(job.output, target) as out,
    ):
        _check_kept(given.reader, results)
        alone = nodes.count == 1  # other hosts would wait for this one's ranks
        if alone and given.reader.again and not given.reader.count(1):
            note(f"{given.reader.shown} holds no prompts, so no model is loaded")
            if target is not None:
                results.publish(0)
            return
        emit = _emitter(results, out)
        tally, stats = _answer(job, nodes, at_hand, given, results, lambda: emit(False), silent=silent)
        with remains(partial(rows_left, results)):
            emit(True)
            if target is not None and not tally.interrupted:
                results.publish(tally.lines)
        note(summary(tally, stats))
        if tally.interrupted:
            note(left_behind(tally, results))
            raise typer.Exit(130)
    if tally.errors:
        raise typer.Exit(1)


def _answer(
    job: Job,
    nodes: Nodes,
    at_hand: TemplateAtHand,
    given: Opened,
    results: Results,
    emit: Callable[[], object],
    *,
    silent: bool,
) -> tuple[Tally, EngineStats | None]:
    """Start the engine and put a row for each line into ``results``; what was counted, and what the engine counted if
    it was not interrupted. ``emit`` is called whenever there may be more rows."""
    from tpctl.client.batch import Batch
    from tpctl.client.engine_client import EngineClient
    from tpctl.client.jobs import JobParser
    from tpctl.client.resume import remains, rows_left

    reader = given.reader
    waited_for = target_of(job.output) is None or not reader.again  # somebody may want the first rows soon
    policy = job.policy or (SchedulingPolicy.fcfs if waited_for else SchedulingPolicy.auto)
    needed = reader.mentions("messages") and not reader.mentions("chat_template_kwargs")
    look = partial(look_ahead, at_hand, needed=needed)
    config = prepare(job.model, job.engine, policy, look, nodes=nodes)
    with remains(partial(rows_left, results)), EngineClient(config, nodes=nodes) as client:
        say_nodes(config, nodes)
        tokenizer = at_hand.tokenizer(config.text_dir)
        info = _wait_ready(client, job.model, job.policy, silent=silent)
        parser = JobParser(
            tokenizer,
            sampling=job.sampling,
            stop=job.stop,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            form=lambda: given.source.form,
        )
        with progress(given.total, config.tp_size, silent=silent) as show, interrupts() as noted:
            tally = Batch(client, tokenizer, results, window=4 * config.max_num_seqs).run(
                reader.lines(),
                parser,
                together=TOGETHER if reader.again else 1,
                step=lambda tally: (show(tally), emit()),
                should_stop=lambda: noted,
            )
        return tally, None if tally.interrupted else client.stats()


def _check_kept(reader: Reader, results: Results) -> None:
    """Before a run goes on: whether the rows it finds answer the lines it is given; a pipe cannot be asked."""
    from tpctl.client.resume import check_kept

    if results.count and reader.again:
        remark = check_kept(results, reader.lines(), reader.shown)
        if remark is not None:
            note(remark)


def _wait_ready(client: EngineClient, model: str, asked: SchedulingPolicy | None, *, silent: bool) -> EngineInfo:
    with status(f"loading {model}") as told:
        info = client.wait_ready(told)
    if not silent:
        note(f"{model} is ready ({describe(info)})")
    say_policy(asked, info)
    say_context(info)
    return info


def _emitter(results: Results, out: IO[bytes] | None) -> Callable[[bool], None]:
    """Writes finished rows where they go out at once: up to the first that is missing, or with ``gaps`` all."""

    def emit(gaps: bool) -> None:
        if out is not None:
            with writing():
                results.emit(out, gaps=gaps)

    return emit

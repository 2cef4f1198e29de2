"""``tpctl batch`` over several engines, or into a folder of parts: docs/batch.md."""

from __future__ import annotations

import shutil
import signal
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpctl.cli.batch_formats import located, refuse_among_input
from tpctl.cli.batch_report import end_if_finished, job_progress, job_summary
from tpctl.cli.console import note
from tpctl.cli.engine import engine_args, interrupts, prepare
from tpctl.cli.options import (
    AttentionBackend,
    Device,
    EngineOptions,
    KvCacheDType,
    SchedulingPolicy,
    TemplateOptions,
)
from tpctl.cli.template import TemplateAtHand, look_ahead
from tpctl.errors import OutputError, UsageError, counted

if TYPE_CHECKING:
    from tpctl.batch.folder import JobFolder
    from tpctl.batch.formats.choose import Asked, FormatSpec
    from tpctl.batch.plan import Division
    from tpctl.wire.settings import EngineConfig


_FIRST = 1 << 20  # bytes of lines that are looked at before a batch begins


@dataclass(frozen=True)
class JobOptions:
    """What only a batch over parts has; ``None`` and ``False``: not given."""

    replicas: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Engines, each on its own --tp GPUs or its share of the cores. auto: as many as the GPUs allow; on a "
            "CPU one for each memory node. 0: only those that others start (tpctl replica). Default: 1, the tasks of "
            "the SLURM job, or what the Ray cluster has room for.",
        ),
    ] = None
    hosts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|slurm",
            help="Where replicas run. FILE: hosts to reach by ssh, one a line, slots=N for several replicas. slurm: "
            "inside a SLURM job, one a task. All see OUTPUT and PROMPTS by the same paths.",
        ),
    ] = None
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT|auto",
            help="Run the replicas on a Ray cluster, each in a placement group of --tp GPUs or CPUs; auto: the cluster "
            "that this machine is a node of. All nodes see OUTPUT and PROMPTS by the same paths.",
        ),
    ] = None
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="With --resume: answer rows that are errors again.")
    ] = False
    gpu_hour_price: Annotated[
        float | None, typer.Option(metavar="PRICE", min=0.0, help="Of one GPU for an hour: stats then have the cost.")
    ] = None
    part_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of a part. Default: 1000, or fewer if the input is small.")
    ] = None
    step_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1.0,
            help="An engine that has work and makes no step for so long counts as dead. Default: 300 on GPUs, on a CPU "
            "600, or more where the model is large.",
        ),
    ] = None

    def count(self) -> int | None:
        """Replicas that are asked for; ``None``: as many as there is room for.

        Raises:
            UsageError: it is no number, and not auto.
        """
        if self.replicas is None or self.replicas == "auto":
            return None if self.replicas or self.hosts or self.ray else 1
        if not self.replicas.isascii() or not self.replicas.isdigit() or not int(self.replicas) <= 1024:
            raise UsageError(f"--replicas is {self.replicas}, but must be a whole number from 0 to 1024, or auto")
        return int(self.replicas)

    @property
    def elsewhere(self) -> bool:
        """Whether replicas run on other hosts alone, which may have GPUs that this one has not."""
        return self.hosts is not None or self.ray is not None or self.count() == 0


@dataclass(frozen=True)
class Job:
    """One call of ``tpctl batch``: what is answered with what, and where to."""

    prompts: str
    output: str
    model: str
    resume: bool
    force: bool
    policy: SchedulingPolicy | None
    engine: EngineOptions
    sampling: dict[str, Any]
    stop: list[str]
    template: TemplateOptions
    asked: Asked
    options: JobOptions

    @property
    def policy_of_parts(self) -> SchedulingPolicy:
        """That of engines whose rows nobody waits for."""
        return self.policy or SchedulingPolicy.auto

    @property
    def folder(self) -> bool:
        """Whether the output is a folder of parts, which stays."""
        return self.output.endswith("/") or Path(self.output).is_dir()


def is_job(output: str, options: JobOptions) -> bool:
    """Whether a batch runs over parts: into a folder, or with several replicas.

    Raises:
        UsageError: it does not, but is given what only such a batch has.
    """
    if output != "-" and (output.endswith("/") or Path(output).is_dir()):
        return True
    if options.hosts is not None or options.ray is not None or options.count() != 1:
        if output == "-":
            named = {"hosts": options.hosts, "ray": options.ray, "replicas": options.replicas}
            given = next(f"--{name} {value}" for name, value in named.items() if value is not None)
            raise UsageError(f"{given} needs a file or a folder for the rows; name it with -o")
        return True
    for name in ("retry_errors", "gpu_hour_price", "part_rows", "step_timeout"):
        if getattr(options, name) not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} needs a folder (-o FOLDER/) or --replicas above 1")
    return False


def run_job(job: Job) -> None:
    """Answer every line over parts.

    Raises:
        TpctlError: it cannot be begun, or not go on.
        typer.Exit: 1 if a row is an error, 130 if it was interrupted.
    """
    from tpctl.batch.claim import claimed
    from tpctl.batch.folder import JobFolder
    from tpctl.batch.formats.choose import choose
    from tpctl.batch.launchers import check_place
    from tpctl.batch.manifest import begun, check_settings
    from tpctl.batch.ray_cluster import connected
    from tpctl.batch.status import parts_folder
    from tpctl.client.prepare import model_digest

    spec = located(choose(job.prompts, job.output, job.asked, job.model), job.prompts)
    refuse_among_input(spec, job.output)
    target = None if job.folder else _target(job, spec)
    folder = JobFolder(parts_folder(target) if target is not None else Path(job.output))
    if job.options.retry_errors and not job.resume:
        raise UsageError("--retry-errors is for a batch that was begun before; add --resume")
    if "://" not in spec.prompts and folder.root.resolve() in Path(spec.prompts).parents:
        raise UsageError(f"{job.prompts} lies in {folder.root}, where the rows go; move it, or name another with -o")
    check_place(job.options.count(), job.options.hosts, job.options.ray)
    at_hand = TemplateAtHand(job.template)
    settings = _settings(job, at_hand)
    cluster = nullcontext() if job.options.ray is None else connected(job.options.ray)
    with cluster, claimed(folder):
        goes_on = begun(folder, resume=job.resume, force=job.force)
        if goes_on:
            check_settings(folder, settings)
        needed = _mentions_messages(spec)
        engine = _without_device(job.engine) if job.options.elsewhere else job.engine
        config = prepare(job.model, engine, job.policy_of_parts, partial(look_ahead, at_hand, needed=needed))
        settings["model_digest"] = model_digest(config)
        division = check_settings(folder, settings) if goes_on else None
        errors = _run(job, folder, spec, config, settings, division, target)
        if target is not None:
            shutil.rmtree(folder.root)
    if errors:
        raise typer.Exit(1)


def _run(
    job: Job,
    folder: JobFolder,
    spec: FormatSpec,
    config: EngineConfig,
    settings: dict[str, Any],
    division: Division | None,
    target: Path | None,
) -> int:
    """Answer what is not answered; how many rows are errors."""
    from tpctl.batch.board import assemble
    from tpctl.batch.coordinator import Coordinator
    from tpctl.batch.folder import put
    from tpctl.batch.launchers import Wanted, launcher
    from tpctl.batch.manifest import stats_of, write_manifest
    from tpctl.batch.plan import Plan, division_of, said_repeated
    from tpctl.client.results import state_of
    from tpctl.client.resume import remains

    options, shared = job.options, job.engine.kv_cache_memory is not None
    device = job.engine.device if options.elsewhere else config.device
    wanted = Wanted(options.count(), options.hosts, config.tp_size, device, shared, options.ray is not None)
    local, on_a_host = launcher(folder.root, wanted)
    replicas = len(local.slots)
    part_rows = options.part_rows
    if division is not None and part_rows not in (None, division.rows):
        raise UsageError(
            f"--part-rows {part_rows} is given, but the parts of {folder.root} have {division.rows} rows; leave it out"
        )
    before = None if target is None else state_of(target)
    formats = spec.formats()
    plan = Plan(folder, formats, division or division_of(formats, max(1, replicas), part_rows))
    write_manifest(folder, settings, plan)
    _write_spec(job, folder, spec, settings["model_digest"], config.tp_size, on_a_host)
    coordinator = Coordinator(folder, plan, local, retry_errors=options.retry_errors, say=note)
    if not replicas:
        note(f"waiting for replicas: `tpctl replica {folder.root.resolve()}`")

    def rows_left() -> str | None:
        finished = coordinator.board.sums.rows
        if not finished or not folder.job.is_dir():
            return None
        return f"parts with {counted(finished, 'row')} are in {folder.root}"

    with remains(rows_left), coordinator:
        with job_progress(replicas, config.tp_size) as show, interrupts(signal.SIGINT, signal.SIGTERM) as noted:
            done = coordinator.run(show, lambda: noted)
        if done:
            write_manifest(folder, settings, plan)
    stats = stats_of(coordinator.board, coordinator.totals(), price=job.options.gpu_hour_price)
    put(folder.stats, stats)
    note(job_summary(stats, plan.rows if done else None))
    if not done:
        note(f"interrupted; finished rows are kept in {folder.root}, go on with --resume")
        raise typer.Exit(128 + noted.number)
    if coordinator.repeated:
        note(said_repeated(coordinator.repeated))
    if target is not None:

        def unchanged() -> None:
            if state_of(target) not in (None, before):
                raise OutputError(f"{target} changed while this ran, and is left as it is; move it away and --resume")

        assemble(folder, formats.sink, target, len(coordinator.board.done), unchanged)
    return int(stats["errors"])


def _target(job: Job, spec: FormatSpec) -> Path:
    """The file that the rows are put together in.

    Raises:
        OutputError: it may not be written.
        typer.Exit: it is finished.
    """
    from tpctl.batch.status import parts_folder
    from tpctl.batch.target import check_file
    from tpctl.cli.places import refuse_own_input, target_of

    target = target_of(job.output)
    if target is None:
        raise OutputError(f"{job.output} is no file that parts can be put together in; name a file or a folder with -o")
    refuse_own_input(job.prompts, job.output)
    check_file(
        target,
        resume=job.resume,
        force=job.force,
        finished=lambda: end_if_finished(spec, target, parts_folder(target)),
    )
    return target


def _settings(job: Job, at_hand: TemplateAtHand) -> dict[str, Any]:
    """What answers depend on besides their lines."""
    return {
        "model": job.model,
        "dtype": str(job.engine.dtype),
        "kv_cache_dtype": str(job.engine.kv_cache_dtype),
        "max_model_len": job.engine.max_model_len,
        "sampling": job.sampling,
        "stop": job.stop,
        "template": at_hand.settings,
        "formats": job.asked.settings,
    }


def _without_device(engine: EngineOptions) -> EngineOptions:
    """The options by which this host finds a model that it will not run."""
    auto, backend = KvCacheDType.auto, AttentionBackend.auto
    return replace(engine, device=Device.cpu, kv_cache_dtype=auto, attention_backend=backend)


def _write_spec(job: Job, folder: JobFolder, formats: FormatSpec, digest: str, tp_size: int, on_a_host: int) -> None:
    from tpctl.batch.folder import put
    from tpctl.batch.spec import JobSpec
    from tpctl.checkpoint.sources import local_path

    if job.template.chat_template is not None:
        put(folder.template, job.template.chat_template.read_bytes())
    variables, timeout = job.template.chat_template_kwargs, job.options.step_timeout
    args = replace(engine_args(job.engine, job.policy_of_parts), tp=tp_size, engines_on_host=on_a_host)
    model = str(local_path(job.model).resolve()) if local_path(job.model).exists() else job.model
    JobSpec(formats, model, digest, args, job.sampling, job.stop, variables, timeout).write(folder)


def _mentions_messages(spec: FormatSpec) -> bool:
    """Whether one of the first lines is for the chat template."""
    with spec.formats().source.open() as reader:
        return reader.mentions("messages", most=_FIRST)

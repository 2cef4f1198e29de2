"""``tpctl replica``: one engine that answers lines of a batch which ``tpctl batch`` runs, here or on another host."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpctl.cli.console import byte_progress, note
from tpctl.cli.options import TemplateOptions
from tpctl.cli.signals import end_if_told
from tpctl.cli.template import TemplateAtHand
from tpctl.errors import EngineError, SourceError, UsageError

if TYPE_CHECKING:
    from tpctl.client.prepare import EngineArgs


def replica(
    folder: Annotated[Path, typer.Argument(help="Folder of the batch: that of its parts.")],
    name: Annotated[
        str | None, typer.Option(help="Unlike that of any other. Default: made of host and process.")
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="K/N", help="Use the K-th of N shares of this host: its cores, or --tp of its GPUs. Default: 1/1."
        ),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0.0, help="For a batch that has not begun, or that nobody runs now. Default: 0."
        ),
    ] = None,
    tied: Annotated[bool, typer.Option("--tied", help="End when standard input does.")] = False,
) -> None:
    """Run one engine for a batch: take lines that its folder offers, answer them, until all are answered.

    `tpctl batch` starts as many as it is told on its own host, and takes up what any other one does that sees the same
    folder and the same input by the same paths. Nothing else connects them: no port is open. The exit code is 75 if the
    engine failed, and another start may help. SIGTERM ends it in order: what it has finished stays, and others take
    the rest.
    """
    from tpctl.batch.folder import JobFolder
    from tpctl.batch.local import ENGINE_FAILED
    from tpctl.batch.replica import Asked, Replica, await_batch, ended, new_name
    from tpctl.batch.spec import JobSpec
    from tpctl.client import prepare as client
    from tpctl.client.engine_client import EngineClient
    from tpctl.launch.lifeline import PARENT_PID, tie_to_parent, tie_to_stdin

    if PARENT_PID in os.environ:
        tie_to_parent()
    if tied:
        tie_to_stdin()
    if name is not None and not re.fullmatch(r"[\w-]{1,100}", name, re.ASCII):
        raise UsageError(f"--name is {name}, but must be of letters, digits, - and _, 100 at most")
    which = parse_share(share)
    job = JobFolder(folder)
    if wait is not None and not await_batch(job, wait):
        note(f"nobody runs a batch in {folder}, or it is done")
        return
    spec = JobSpec.read(folder)
    if wait is None and not tied and PARENT_PID not in os.environ and (state := ended(job)) is not None:
        advice = "" if state == "done" else "; go on with `tpctl batch … --resume`, or give --wait SECONDS for who does"
        note(f"nobody runs the batch in {folder}: it is {state}{advice}")
        return
    engine_args = spec.engine if which is None else of_share(spec.engine, *which)
    template = TemplateOptions(job.template if job.template.exists() else None, spec.template_variables)
    try:
        with Replica(job, name or new_name(), spec.engine.tp or 1) as place:
            formats = spec.formats.formats()
            with formats.source.open():
                pass  # whether this host sees the input, and can read it, is said before minutes of loading
            at_hand = TemplateAtHand(template)
            config = client.prepare(spec.model, engine_args, progress=byte_progress)
            place.gpus = config.tp_size if config.device == "cuda" else 0
            if (found := client.model_digest(config)) != spec.model_digest:
                raise SourceError(
                    f"{spec.model} is another one here (digest {found[:12]}) than where the batch began "
                    f"({spec.model_digest[:12]}); name a revision, or a folder that all hosts see"
                )
            with EngineClient(config) as engine:
                tokenizer = at_hand.tokenizer(config.text_dir)
                asked = Asked(formats, spec.sampling, spec.stop, spec.step_timeout)
                end_if_told()
                tally = place.answer(engine, tokenizer, asked, config)
    except EngineError as error:
        note(f"tpctl: {error}")
        raise typer.Exit(ENGINE_FAILED) from None
    note(f"{tally.lines:,} rows, {tally.completion_tokens:,} tokens")


def parse_share(text: str | None) -> tuple[int, int] | None:
    """``K/N`` as two numbers.

    Raises:
        UsageError: it is none.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text, re.ASCII)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--share is {text}, but must be K/N: the K-th of N shares, from 1/N to N/N")
    return int(found[1]), int(found[2])


def of_share(args: EngineArgs, number: int, count: int) -> EngineArgs:
    """Leave to this process its share of what the host has, and say so to the engine.

    Raises:
        UsageError: the host has fewer GPUs than that.
    """
    from tpctl.launch.device import choose_device
    from tpctl.launch.places import cores_of, places

    device = choose_device(args.device, 1)
    (*_, gpus) = places(count, args.tp or 1, device, args.kv_cache_memory is not None)[:number]
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    elif (cores := cores_of(number - 1, count)) is not None:
        os.sched_setaffinity(0, cores)
    return replace(args, engines_on_host=count)

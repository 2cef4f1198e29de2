"""``tpctl replica``: one engine that answers lines of a batch which ``tpctl batch`` runs, here or on another host."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from tpctl.cli.batch_job import model_digest
from tpctl.cli.console import byte_progress, note
from tpctl.cli.options import TemplateOptions
from tpctl.cli.template import TemplateAtHand
from tpctl.errors import EngineError, SourceError, UsageError

WORKER_VARIABLE = "TPCTL_WORKER"
"""Names the module that ranks run, where it is not the engine's: for tests of everything around it."""


def replica(
    folder: Annotated[Path, typer.Argument(help="Folder of the batch: that of its parts.")],
    name: Annotated[
        str | None, typer.Option(help="Unlike that of any other. Default: made of host and process.")
    ] = None,
) -> None:
    """Run one engine for a batch: take lines that its folder offers, answer them, until all are answered.

    `tpctl batch` starts as many as it is told on its own host, and takes up what any other one does that sees the same
    folder and the same input by the same paths. Nothing else connects them: no port is open. The exit code is 75 if the
    engine failed, and another start may help.
    """
    from tpctl.batch.folder import JobFolder
    from tpctl.batch.local import ENGINE_FAILED
    from tpctl.batch.replica import Asked, Replica, new_name
    from tpctl.batch.spec import JobSpec
    from tpctl.client import prepare as client
    from tpctl.client.engine_client import EngineClient
    from tpctl.launch.lifeline import PARENT_PID, tie_to_parent
    from tpctl.launch.torchrun import WORKER

    if PARENT_PID in os.environ:
        tie_to_parent()
    if name is not None and not re.fullmatch(r"[\w-]{1,100}", name, re.ASCII):
        raise UsageError(f"--name is {name}, but must be of letters, digits, - and _, 100 at most")
    spec = JobSpec.read(folder)
    job = JobFolder(folder)
    template = TemplateOptions(job.template if job.template.exists() else None, spec.template_variables)
    try:
        with Replica(job, name or new_name(), spec.engine.tp or 1) as place:
            at_hand = TemplateAtHand(template)
            config = client.prepare(spec.model, spec.engine, progress=byte_progress)
            if (found := model_digest(config)) != spec.model_digest:
                raise SourceError(
                    f"{spec.model} is another one here (digest {found[:12]}) than where the batch began "
                    f"({spec.model_digest[:12]}); name a revision, or a folder that all hosts see"
                )
            place.gpus = config.tp_size if config.device == "cuda" else 0
            with EngineClient(config, module=os.environ.get(WORKER_VARIABLE) or WORKER) as engine:
                tokenizer = at_hand.tokenizer(config.text_dir)
                asked = Asked(Path(spec.prompts), spec.sampling, spec.stop, spec.step_timeout)
                tally = place.answer(engine, tokenizer, asked, config)
    except EngineError as error:
        note(f"tpctl: {error}")
        raise typer.Exit(ENGINE_FAILED) from None
    note(f"{tally.lines:,} rows, {tally.completion_tokens:,} tokens")

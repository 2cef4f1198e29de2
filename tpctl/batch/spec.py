"""What the coordinator tells replicas of the batch: ``.job/job.json``, all that they need besides the folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpctl.batch.folder import JobFolder, load, put
from tpctl.batch.formats.choose import FormatSpec
from tpctl.client.prepare import EngineArgs
from tpctl.errors import SourceError
from tpctl.launch.nodes import Nodes

VERSION = 3


@dataclass(frozen=True)
class JobSpec:
    """A batch as its replicas run it.

    Attributes:
        formats: of the input, by a path that holds on every host, and of the output.
        model: as the user named it; ``model_digest`` tells whether another host has the same.
        sampling: fields of ``SamplingParams`` for lines that do not set them; ``stop``: texts that end answers.
        template_variables: for the chat template, as JSON; its file is in the folder, if it is not the model's own.
        step_timeout: seconds without a step after which an engine counts as hung; ``None``: as its model has it.
    """

    formats: FormatSpec
    model: str
    model_digest: str
    engine: EngineArgs
    sampling: dict[str, Any]
    stop: list[str]
    template_variables: str | None
    step_timeout: float | None = None

    def write(self, folder: JobFolder) -> None:
        """Raises ``OutputError`` if it cannot be written."""
        put(folder.spec, {"version": VERSION, **asdict(self)})

    @staticmethod
    def read(root: Path) -> JobSpec:
        """The batch of a folder.

        Raises:
            SourceError: there is none, or one of another version.
        """
        values = load(JobFolder(root).spec)
        if values is None:
            raise SourceError(f"{root} holds no batch to answer lines of; `tpctl batch` begins one")
        if (version := values.pop("version", None)) != VERSION:
            raise SourceError(f"{root} holds a batch of version {version}; this tpctl reads version {VERSION}")
        engine = values["engine"]
        args = EngineArgs(**{**engine, "nodes": Nodes(**engine["nodes"])})
        return JobSpec(**{**values, "formats": FormatSpec.from_json(values["formats"]), "engine": args})

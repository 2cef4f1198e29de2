"""Every wrong input of the commands on checkpoints and shards, with the one line that answers it.

``docs/bad-input.md`` shows the lines and is compared with what the commands say. After a wanted change:
``python -m tests.unit.test_bad_input > docs/bad-input.md``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from tests.unit.hub_server import Hub, Refusal, serving
from tests.unit.synthetic import make_checkpoint, make_config
from tests.unit.test_download import environment, files
from tpctl.checkpoint.safetensors import TensorSpec, read_header
from tpctl.cli import app as app_module
from tpctl.sharding.cutting.shard import shard_checkpoint

PAGE = Path(__file__).parent.parent.parent / "docs" / "bad-input.md"
PART = "model-rank-1-part-0.safetensors"


def flip(path: Path, place: int) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])


def data_place(folder: Path) -> int:
    return read_header(folder / PART).size + 100


Change = Callable[[Path], object]
CHANGES: dict[str, Change] = {
    "cut": lambda folder: os.truncate(folder / PART, 100),
    "flipped": lambda folder: flip(folder / PART, data_place(folder)),
    "header": lambda folder: flip(folder / PART, 200),
    "manifest": lambda folder: flip(
        folder / "tpctl.json", (folder / "tpctl.json").read_bytes().rindex(b'"digest":"') + 12
    ),
    "edited": lambda folder: (folder / "config.json").write_text("{}"),
    "stray": lambda folder: shutil.copy(folder / PART, folder / "model-rank-1-part-7.safetensors"),
    "some": lambda folder: (folder / PART).unlink(),
}
"""Copies of the shard folder ``shards`` (tp 2), each with one thing wrong."""


def prepare(folder: Path) -> None:
    """What the commands below are pointed at."""
    model = make_checkpoint(folder / "model", make_config())
    shard_checkpoint(model, folder / "shards", 2)
    shard_checkpoint(model, folder / "rank0", 2, ranks=[0])
    make_checkpoint(folder / "other", make_config("qwen3"))
    for name, change in CHANGES.items():
        change(shutil.copytree(folder / "shards", folder / name))
    make_checkpoint(folder / "narrow", make_config()).joinpath("config.json").write_text(
        json.dumps(make_config(vocab_size=71))
    )
    os.truncate(make_checkpoint(folder / "short", make_config()) / "model.safetensors", 5000)
    (folder / "mamba").mkdir()
    (folder / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    (folder / "mamba" / "model.safetensors").touch()
    (folder / "pickles").mkdir()
    (folder / "pickles" / "config.json").write_text(json.dumps(make_config()))
    (folder / "pickles" / "pytorch_model.bin").touch()
    (folder / "empty").mkdir()
    other_kinds(model, folder)
    (folder / "loop").symlink_to("loop")


def other_kinds(model: Path, folder: Path) -> None:
    """Checkpoints that are something else than they seem."""
    wide = Path(shutil.copytree(model, folder / "wide")) / "model.safetensors"
    header = read_header(wide)
    data = bytearray(header.file_size - header.size)
    data[200:202] = b"\x89\x47"  # 70144 in bfloat16
    wide.write_bytes(header.raw + data)
    tensor = TensorSpec("model.layers.0.self_attn.q_proj.qweight", "I32", (3, 24))
    make_checkpoint(folder / "awq", make_config(), extra=[tensor])
    capped = Path(shutil.copytree(model, folder / "capped"))
    (capped / "config.json").write_text(json.dumps(make_config(final_logit_softcapping=30.0)))
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (folder / "lora" / "adapter_model.safetensors").touch()


LOCAL = {
    "no such model": "shard nowhere --tp 2",
    "unknown architecture": "shard mamba --tp 2",
    "weights as pickles only": "shard pickles --tp 2",
    "more ranks than query heads": "shard model --tp 5",
    "no ranks": "shard model --tp 0",
    "no number": "shard model --tp two",
    "config.json of another model": "shard narrow --tp 2",
    "a field of another architecture": "shard capped --tp 2",
    "quantised weights that no config tells of": "shard awq --tp 2",
    "an adapter": "shard lora --tp 2",
    "a value beyond the range of a cast": "shard wide --tp 2 --dtype float16",
    "a truncated weight file": "shard short --tp 2",
    "a shard folder to be cut": "shard shards --tp 4",
    "a rank that does not exist": "shard model --tp 2 --ranks 5",
    "no list of ranks": "shard model --tp 2 --ranks 3-1",
    "an unknown dtype": "shard model --tp 2 --dtype int3",
    "a size without a unit": "shard model --tp 2 --max-part-size 5",
    "an uneven split for vLLM": "shard model --tp 3 --compat vllm",
    "an unknown engine": "shard model --tp 2 --compat trt",
    "an output that exists": "shard model --tp 2 -o shards",
    "ranks added where listed files are elsewhere": "shard model --tp 2 --ranks 1 -o some",
    "no shard folder": "reshard model --tp 3 -o out",
    "more ranks than query heads, anew": "reshard shards --tp 5 -o out",
    "a rank that was not cut": "reshard rank0 --tp 3 -o out",
    "damaged data, resharding": "reshard flipped --tp 3 -o out",
    "a rank that was not cut, merging": "merge rank0 -o out",
    "an output that is what is read": "merge shards -o shards --force",
    "a link to itself as the output": "merge shards -o loop",
    "damaged data, merging": "merge flipped -o out",
    "a part that is not there, merging": "merge some -o out",
    "not a shard folder": "inspect-shards model",
    "no such rank": "inspect-shards shards --rank 7",
    "a negative rank": "inspect-shards shards --rank -1",
    "a truncated part": "inspect-shards cut",
    "a flipped bit in the data": "inspect-shards flipped --verify",
    "a flipped bit in a header": "inspect-shards header --verify",
    "a flipped bit in the manifest": "inspect-shards manifest --verify",
    "an edited copy of a file": "inspect-shards edited --verify",
    "a part file of another run": "inspect-shards stray --verify",
    "a rank whose files are elsewhere": "inspect-shards some --rank 1 --verify",
    "another model as the source": "inspect-shards shards --source other",
    "shards as the source": "inspect-shards shards --source shards",
    "a page that cannot be written": "inspect-shards shards --html nowhere/page.html",
    "memory without a unit": "plan model --gpu-memory 80",
    "no size": "plan model --gpu-memory lots",
    "more tokens than the model allows": "plan model --max-model-len 1000",
    "more ranks than query heads, planning": "plan model --tp 5",
    "nothing to plan": "plan empty",
    "nothing to upload": "upload empty org/shards",
    "damaged shards to upload": "upload cut org/shards",
    "no repository": "upload shards shards",
    "ranks of what is not on the Hub": "download model --local-ranks 0",
}

REMOTE: dict[str, tuple[str, Refusal | None]] = {
    "a model that the Hub does not know": ("download org/absent", None),
    "a revision that it does not know": ("download org/whole --revision v9", None),
    "a gated model": ("download org/whole", Refusal("/api/", 403, {"X-Error-Code": "GatedRepo"})),
    "access forbidden": ("download org/whole", Refusal("/api/", 403)),
    "no token, or a wrong one": ("download org/whole", Refusal("/api/", 401)),
    "too many requests": ("download org/whole", Refusal("/api/", 429, {"Retry-After": "7"})),
    "the Hub fails": ("download org/whole", Refusal("/api/", 500)),
    "ranks of an unsharded model": ("download org/whole --local-ranks 0", None),
    "a rank that the repository lacks": ("download org/shards --local-ranks 3", None),
    "an output with other files": ("download org/whole -o model", None),
    "no right to write": ("upload shards org/new --token hf_x", Refusal("/api/repos/create", 403)),
}


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def local_answer(command: str, folder: Path) -> Answer:
    """What ``tpctl COMMAND`` says in ``folder``."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["tpctl", *command.split()]),
        mock.patch("signal.signal"),
    ):
        try:
            app_module.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Answer(code, out.getvalue(), err.getvalue().replace(f"{folder.resolve()}{os.sep}", ""))


def remote_answer(command: str, refusal: Refusal | None, folder: Path) -> Answer:
    """The same with a local Hub, in a process of its own, since huggingface_hub reads its settings once."""
    with serving(Hub()) as hub:
        hub.add("org/whole", files(str(folder / "model")))
        hub.add("org/shards", files(str(folder / "shards")))
        hub.refusals = [] if refusal is None else [refusal]
        done = subprocess.run(
            [sys.executable, "-m", "tpctl", *command.split()],
            cwd=folder,
            env={**environment(hub, folder), "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return Answer(done.returncode, done.stdout, done.stderr.replace(hub.url, "https://huggingface.co"))


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def line(what: str, command: str, answer: Answer) -> str:
    said = answer.err.strip().removeprefix("tpctl: ")
    return f"| {cell(what)} | `tpctl {command}` | {answer.code} | {cell(said)} |"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    prepare(folder)
    return folder


def check(what: str, command: str, answer: Answer, inputs: Path) -> None:
    assert answer.code in (1, 2), answer
    assert answer.out == "" and answer.err.count("\n") == 1 and answer.err.startswith("tpctl: "), answer
    wanted = line(what, command, answer)
    if "--help`" in answer.err:  # Typer's own words, which differ between its versions
        wanted = wanted.partition(": ")[0]
    assert any(row.startswith(wanted) for row in PAGE.read_text(encoding="utf-8").splitlines()), wanted
    # Nothing half-written is left, and nothing that was there is gone.
    assert not list(inputs.glob("*.tpctl-partial")) and not list(inputs.glob(".*partial*"))
    assert not (inputs / "out").exists() and (inputs / "shards" / PART).is_file()


@pytest.mark.parametrize("what", LOCAL)
def test_local(what: str, inputs: Path) -> None:
    check(what, LOCAL[what], local_answer(LOCAL[what], inputs), inputs)


@pytest.mark.parametrize("what", REMOTE)
def test_with_a_hub(what: str, inputs: Path) -> None:
    command, refusal = REMOTE[what]
    check(what, command, remote_answer(command, refusal, inputs), inputs)


def test_the_page_has_no_other_rows() -> None:
    rows = re.findall(r"^\| (.+?) \| `tpctl", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [*LOCAL, *REMOTE]


def page() -> str:
    lines = [
        "# What wrong input is answered with",
        "",
        "One line on stderr, nothing on stdout, nothing half-written; exit code 2 where the command line itself is",
        "wrong, else 1. Made and checked by `tests/unit/test_bad_input.py`, which also says what the folders hold.",
        "",
        "| what is wrong | command | exit code | answer |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        lines += [line(what, command, local_answer(command, Path(folder))) for what, command in LOCAL.items()]
        for what, (command, refusal) in REMOTE.items():
            lines.append(line(what, command, remote_answer(command, refusal, Path(folder))))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")

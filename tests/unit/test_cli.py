"""The commands, their options, and how the program ends. ``cli.txt`` freezes the listing: a change to it is a
change for users. After a wanted change: ``python -m tests.unit.test_cli > tests/unit/cli.txt``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.unit.fake_client import engine_info
from tests.unit.synthetic import make_config
from tpctl import __version__
from tpctl.cli import app as app_module
from tpctl.cli.app import app
from tpctl.cli.engine import describe
from tpctl.cli.options import AttentionBackend, Device, DType, EngineOptions, KvCacheDType
from tpctl.errors import EngineError, SourceError, UsageError
from tpctl.wire.settings import ATTENTION_BACKENDS, DEVICES, DTYPES, KV_CACHE_DTYPES, EngineConfig

LISTING = Path(__file__).parent / "cli.txt"


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command under ``group`` by its whole name, "bench latency" for one of a group's."""
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def listing() -> str:
    lines = []
    for name, command in commands(typer.main.get_command(app)):
        lines.append(name)
        for parameter in command.params:
            names = ", ".join(parameter.opts + parameter.secondary_opts)
            if parameter.param_type_name == "argument":
                names = parameter.name.upper()
            lines.append(f"    {names}{' (required)' if parameter.required else ''}")
    return "\n".join(lines) + "\n"


def test_commands_and_options_are_the_frozen_ones() -> None:
    assert listing() == LISTING.read_text(encoding="utf-8")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tpctl", *arguments], capture_output=True, text=True, timeout=60)


def test_version_and_unknown_commands() -> None:
    assert run("--version").stdout == f"tpctl {__version__}\n"
    unknown = run("what")
    assert unknown.returncode == 2
    assert "tpctl: no such command 'what'" in unknown.stderr


@pytest.mark.parametrize("command", ["", "bench"])
def test_a_command_without_its_command_shows_the_help_page(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tpctl", *command.split()])
    monkeypatch.setattr("signal.signal", lambda *given: None)
    with pytest.raises(SystemExit) as ended:
        app_module.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "\nCommands:\n" in said and "\\n" not in said


def test_an_error_is_one_line_and_its_exit_code() -> None:
    result = run("chat", "/nowhere/at/all", "-m", "hi")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("tpctl: there is no file or folder /nowhere/at/all")
    assert result.stderr.count("\n") == 1
    assert run("chat", "demo", "-m", "hi", "--kv-cache-memory", "much").returncode == 2


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("~nosuchuser/foo", "there is no file or folder ~nosuchuser/foo"),
        ("x" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("command", [["chat", "-m", "hi"], ["shard", "--tp", "2"], ["plan"]])
def test_names_that_are_no_paths_are_one_line(command: list[str], model: str, said: str) -> None:
    result = CliRunner().invoke(app_module.app, [*command, model])
    assert isinstance(result.exception, SourceError)
    assert said in str(result.exception)


def test_the_list_of_commands_is_not_cut_short() -> None:
    shown = run("--help").stdout
    assert "inspect-shards  Show, and prove, how every weight was cut.\n" in shown
    assert "..." not in shown.split("Commands:")[1]


def test_without_arguments_the_help_page_is_shown() -> None:
    for group in ((), ("bench",)):
        result = run(*group)
        assert result.returncode in (0, 2) and (result.stdout + result.stderr).startswith("Usage: tpctl")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (EngineError("no GPU"), 1, "tpctl: no GPU\n"),
        (UsageError("wrong"), 2, "tpctl: wrong\n"),
        (KeyboardInterrupt(), 130, "tpctl: interrupted\n"),
        (KeyboardInterrupt("some parts are kept"), 130, "tpctl: interrupted; some parts are kept\n"),
        (OSError(28, "No space left on device"), 1, "tpctl: input or output failed: No space left on device\n"),
        (OSError(5, "Input/output error", "a/b"), 1, "tpctl: a/b: Input/output error\n"),
        (OSError("a\nb"), 1, "tpctl: input or output failed: a b\n"),
    ],
)
def test_how_the_program_ends(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(app_module, "_command", fail)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as ended:
        app_module.main()
    assert ended.value.code == code
    assert capsys.readouterr().err == said


def test_choosing_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpctl.launch import device

    monkeypatch.setattr(device, "_torch_has_cuda", lambda: True)
    for gpus, wanted, tp_size, chosen in [
        (0, None, 4, "cpu"),
        (2, None, 2, "cuda"),
        (2, "cpu", 4, "cpu"),
        (1, "cuda", 1, "cuda"),
    ]:
        monkeypatch.setattr(device, "visible_gpus", lambda gpus=gpus: gpus)
        assert device.choose_device(wanted, tp_size) == chosen
    for gpus, wanted, message in [(0, "cuda", "0 are visible"), (2, None, "--tp 3 needs 3 GPUs, but 2 visible")]:
        monkeypatch.setattr(device, "visible_gpus", lambda gpus=gpus: gpus)
        with pytest.raises(UsageError, match=message):
            device.choose_device(wanted, 3)


def test_preparing_takes_the_shard_folders_tp_and_every_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tpctl.checkpoint.sources import ResolvedSource
    from tpctl.cli.engine import prepare
    from tpctl.cli.options import SchedulingPolicy
    from tpctl.wire.settings import POLICIES

    source = ResolvedSource(tmp_path, "m", None)
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    monkeypatch.setattr("tpctl.client.prepare.supported_source", lambda model, tp_size, **given: source)
    monkeypatch.setattr(
        "tpctl.client.prepare.ensure_sharded", lambda source, tp_size, progress, **how: tmp_path / f"tp{tp_size}"
    )
    monkeypatch.setattr("tpctl.client.prepare.ensure_verified", lambda folder, ranks, progress: None)
    options = EngineOptions(
        tp=3, device=Device.cpu, dtype=DType.float32, kv_cache_memory="2GiB", block_size=32, enforce_eager=True
    )
    config = prepare("m", options)
    assert (config.shard_dir, config.tp_size, config.device) == (tmp_path / "tp3", 3, "cpu")
    assert (config.dtype, config.kv_cache_memory, config.block_size) == ("float32", 2 << 30, 32)
    assert config.enforce_eager
    assert prepare("m", EngineOptions(device=Device.cpu)).tp_size == 1
    with pytest.raises(UsageError, match="--max-model-len 100000 is not between 2 and"):
        prepare("m", EngineOptions(device=Device.cpu, max_model_len=100000))
    policies = {prepare("m", options, policy).scheduling_policy for policy in SchedulingPolicy}
    assert policies == set(POLICIES)


def test_the_command_line_knows_every_attention_backend() -> None:
    from tpctl.attention_choice import BACKENDS

    assert set(AttentionBackend) == {"auto", *BACKENDS}
    for options, known in ((AttentionBackend, ATTENTION_BACKENDS), (KvCacheDType, KV_CACHE_DTYPES), (DType, DTYPES)):
        assert tuple(options) == known
    assert tuple(Device) == DEVICES


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention_backend": "triton"}, "--attention-backend triton needs a GPU; on a CPU use auto or sdpa"),
        ({"kv_cache_dtype": "packed"}, "--kv-cache-dtype packed needs a GPU; on a CPU use auto, model or fp8"),
        ({"kv_cache_dtype": "int8"}, "unknown KV cache dtype 'int8'; use auto, model, packed, fp8"),
        ({"scheduling_policy": "sjf"}, "unknown scheduling policy 'sjf'"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "8 is less than --max-num-seqs 9"),
    ],
)
def test_settings_that_no_engine_takes(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        EngineConfig(Path("shards"), 1, **settings)


def test_what_a_packed_cache_needs() -> None:
    """Triton is imported where it is built only, so what it is refused for can be asked anywhere."""
    import torch

    from tpctl.layers.attention.base import AttentionSpec
    from tpctl.layers.attention.select import make_backend

    def refused(backend: str, dtype: torch.dtype, head_dim: int, whole: bool = True) -> str:
        heads = [AttentionSpec(4, 2, head_dim, 1.0)]
        with pytest.raises(UsageError) as refusal:
            make_backend(backend, "cuda", dtype, heads, None, kv_cache_dtype="packed", whole_heads=whole)
        return str(refusal.value)

    assert "needs --attention-backend triton, not sdpa; use auto or model" in refused("sdpa", torch.bfloat16, 64)
    if find_spec("triton") is not None:
        assert "needs bfloat16, not float16" in refused("triton", torch.float16, 64)
        heads = "needs heads of 64, 128, 256 dimensions, all of them rotated, not"
        assert f"{heads} 80" in refused("triton", torch.bfloat16, 80)
        assert heads in refused("triton", torch.bfloat16, 128, whole=False)


def test_an_engine_says_how_it_runs() -> None:
    plain = engine_info(device="cuda", dtype="bfloat16", attention_backend="triton", kv_cache_dtype="bfloat16")
    packed = replace(plain, kv_cache_dtype="packed", all_reduce="NCCL")
    assert describe(packed) == "tp 2, bfloat16, triton attention on GPU, packed KV cache, all-reduce by NCCL"
    assert describe(plain) == "tp 2, bfloat16, triton attention on GPU"


if __name__ == "__main__":
    print(listing(), end="")

"""A manifest that comes from anywhere: whatever it says, one line or a right result, in little time and memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.expert_config import CONFIG
from tests.unit.synthetic import folder_bytes, make_checkpoint, make_config
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.checkpoint.metadata import read_metadata
from tpctl.cli.app import main
from tpctl.errors import ShardFolderError, TpctlError
from tpctl.manifest import file as manifest_file
from tpctl.manifest import manifest as module
from tpctl.manifest.manifest import MANIFEST, Manifest
from tpctl.sharding.cutting import writer
from tpctl.sharding.cutting.merge import merge_shards
from tpctl.sharding.cutting.reshard import reshard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.proving.damage import load_manifest
from tpctl.sharding.showing.inspect import inspect_shards
from tpctl.sharding.showing.page import render


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint ``model``, its shards ``two``, and what they give: ``whole`` and ``three``."""
    place = tmp_path_factory.mktemp("untrusted")
    model = make_checkpoint(place / "model", make_config(num_hidden_layers=1), files=2)
    shard_checkpoint(model, place / "two", 2, max_part_size=6000)
    shutil.copytree(place / "two", place / "crafted")
    merge_shards(place / "two", place / "whole")
    reshard(place / "two", place / "three", 3)
    return place


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of six FP8 experts that are dealt to two groups of two ranks."""
    place = tmp_path_factory.mktemp("experts")
    model = make_checkpoint(place / "model", CONFIG, files=2)
    shard_checkpoint(model, place / "two", 4, max_part_size=6000, cutting=Cutting(2))
    shutil.copytree(place / "two", place / "crafted")
    merge_shards(place / "two", place / "whole")
    reshard(place / "two", place / "three", 3, cutting=Cutting(3))
    return place


def content(place: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((place / "two" / MANIFEST).read_text())
    value.pop("sha256")
    return value


def craft(place: Path, value: Any) -> Path:
    """The folder ``crafted`` with a manifest that says ``value`` and has the right digest."""
    text = module._text(value)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    raw = module._text({**value, "sha256": digest}).encode("utf-8", "surrogatepass")
    (place / "crafted" / MANIFEST).write_bytes(raw)
    return place / "crafted"


def changed(value: Any, path: str, new: Any) -> Any:
    *outer, last = path.split("/")
    held = value
    for key in outer:
        held = held[int(key) if isinstance(held, list) else key]
    held[int(last) if isinstance(held, list) else last] = new
    return value


def every_use(place: Path, folder: Path) -> dict[str, Exception | None]:
    """What the commands make of ``folder``: an error, or nothing where the result is that of the true manifest."""

    def merge() -> None:
        merge_shards(folder, place / "out")
        assert folder_bytes(place / "out") == listed(folder, folder_bytes(place / "whole"))

    def again() -> None:
        reshard(folder, place / "out", 3, cutting=Cutting(Manifest.load(place / "three").expert_parallel))
        made, right = folder_bytes(place / "out"), listed(folder, folder_bytes(place / "three"))
        assert {**made, MANIFEST: b""} == {**right, MANIFEST: b""}

    def inspect(verify: bool = False) -> None:
        report = inspect_shards(folder, verify=verify)
        config = ModelConfig.load(folder)
        assert "</script>" in render(report, config)

    uses: dict[str, Callable[[], object]] = {
        "merge": merge,
        "reshard": again,
        "inspect": inspect,
        "verify": lambda: inspect(verify=True),
        "source": lambda: inspect_shards(folder, source=place / "model"),
        "plan": lambda: read_metadata(str(folder)),
        "files": lambda: Manifest.load(folder).check_files(folder),
    }
    found: dict[str, Exception | None] = {}
    for name, use in uses.items():
        try:
            use()
            found[name] = None
        except TpctlError as error:
            assert len(str(error)) < 2000
            found[name] = error
        finally:
            shutil.rmtree(place / "out", ignore_errors=True)
    assert not list(place.glob(".*"))
    return found


def listed(folder: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """Without files that the manifest lists no more, and that no model needs: what it does not list is not moved."""
    kept = json.loads((folder / MANIFEST).read_text())["files"]
    return {name: data for name, data in files.items() if name != "LICENSE" or name in kept}


def test_the_true_manifest_passes(place: Path) -> None:
    assert set(every_use(place, craft(place, content(place))).values()) == {None}


T = "shards/0/tensors/model.layers.0.self_attn.qkv_proj.weight"
REFUSED: dict[str, Any] = {
    "tp_size": (3, 10**9, 10**30),
    f"{T}/pieces": [],
    f"{T}/pieces/0/source": "nope",
    f"{T}/pieces/0/start": [10**6, 0],
    f"{T}/pieces/0/label": ("k", "x" * 10**6),
    f"{T}/dtype": ("F99", "F4", "F32"),
    f"{T}/rule": "row",
    f"{T}/dim": 1,
    f"{T}/shape": ([2**62, 2**62], [1] * 100_000),
    "shards": {},
    "shards/5": {"parts": [], "tensors": {}},
    "source/files": [],
    "source/files/1/name": ("model-00001-of-00002.safetensors", "config.json", "x.json"),
    "source/files/0/size": 10**30,
    "source/files/0/header": ("{", "[" * 100_000, "{}"),
    "source/index": (None, "{", "[" * 100_000, "[]", '{"weight_map": {}}', '{"weight_map": {"a": "b"}}'),
    "source/aliases": {"a": "b"},
    "source/id": ("x" * 10_000, "\ud800"),
    "model_type": ("other", "\x1b[31mred"),
    "dtype": ("F99", "I64", "F16"),
    "compat": ("foo", "vllm"),
    "files": {},
    "files/model-00001-of-00002.safetensors": {"size": 1, "digest": "0" * 64},
    "extra": ({"parts": [], "tensors": {}}, "the shard of rank 0"),
}


@pytest.mark.parametrize(
    ("path", "new"),
    [(path, new) for path, news in REFUSED.items() for new in (news if isinstance(news, tuple) else (news,))],
    ids=lambda value: str(value)[:30],
)
def test_a_manifest_that_is_none_of_its_model_is_refused(place: Path, path: str, new: Any) -> None:
    value = content(place)
    if path == "shards/5":
        new = value["shards"]["1"]
    if isinstance(new, str) and new.startswith("the shard"):
        new = value["shards"]["0"]
    found = every_use(place, craft(place, changed(value, path, new)))
    for name in ("merge", "reshard", "inspect"):
        error = found[name]
        assert isinstance(error, TpctlError), (name, found)
    assert "manifest" in str(found["inspect"]) or MANIFEST in str(found["inspect"])
    assert "; shard the model again" in str(found["inspect"])


W13, W2 = (f"shards/1/tensors/model.layers.0.mlp.experts.{name}_weight" for name in ("w13", "w2"))
SCALE, GATE = f"{W2}_scale_inv", "shards/1/tensors/model.layers.0.mlp.gate.weight"
FIRST = f"{W13}/pieces/0"
EXPERTS_REFUSED: dict[str, Any] = {
    f"{GATE}/stacked": True,
    "shards/1/tensors/model.norm.weight/stacked": True,
    f"{W13}/stacked": (False, "yes", 1),
    f"{W13}/dim": (0, 2, 3),
    f"{W13}/shape": ([3, 16], [10**9, 16, 24], [2**40, 2**22, 0]),
    f"{FIRST}/shape": ([3, 16, 24], [2, 8, 24], [3, 0, 24], [10**9, 8, 24], [3, 8]),
    f"{FIRST}/at": ([1, 0, 0], [0, 8, 0], [0, 1, 0], [0, 0, 1]),
    f"{FIRST}/start": ([3, 32, 0], [10**9, 32, 0], [0, 0, 0], [0, 32, 8]),
    f"{FIRST}/source": ("model.layers.0.mlp.experts.0.gate_proj.weight", "{}", "{0.__class__}", "{}" * 100),
    f"{W13}/pieces": ([], "twice"),
    f"{W2}/pieces/0/shape": ([3, 24, 4], [3, 12, 8]),
    f"{W2}/rule": "experts",
    f"{SCALE}/pieces/0/start": [0, 0, 3],
    f"{SCALE}/dtype": ("F8_E8M0", "BF16", "F4"),
    "expert_parallel": (0, 1, 3, 4, 10**9, 10**30, True, None, "2", [2]),
    "even": ("yes", False, 1, None, 10**30),
}


@pytest.mark.parametrize(
    ("path", "new"),
    [(path, new) for path, news in EXPERTS_REFUSED.items() for new in (news if isinstance(news, tuple) else (news,))],
    ids=lambda value: str(value)[:40],
)
def test_lies_about_experts_are_refused_at_once(experts: Path, path: str, new: Any) -> None:
    value = content(experts)
    if path == f"{W13}/pieces" and new == "twice":
        new = value["shards"]["1"]["tensors"]["model.layers.0.mlp.experts.w13_weight"]["pieces"][:1] * 2
    folder = craft(experts, changed(value, path, new))
    started = time.process_time()
    found = every_use(experts, folder)
    assert time.process_time() - started < 5
    for name in ("merge", "reshard", "inspect", "verify", "source"):
        error = found[name]
        assert isinstance(error, TpctlError), (name, found)
        assert "\n" not in str(error)
    assert "manifest" in str(found["inspect"]) or MANIFEST in str(found["inspect"])
    assert "; shard the model again" in str(found["inspect"])


def test_more_experts_than_there_are_files_for(experts: Path) -> None:
    """Each would be a strip of its own; a sparse file of a terabyte costs nobody anything."""
    value = content(experts)
    stack = value["shards"]["1"]["tensors"]["model.layers.0.mlp.experts.w13_weight"]
    stack["shape"][0] = 10**12
    for piece in stack["pieces"]:
        piece["shape"][0] = 10**12
    tracemalloc.start()
    try:
        found = every_use(experts, craft(experts, value))
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert all("was altered after it was written" in str(found[name]) for name in ("merge", "reshard", "inspect"))


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**63, 10**30, 1.5, float("nan"), "", "x", "../x", "BF16", "F99", "row", "0" * 64, [], {}]),
    st.text(max_size=5),
)


def places_in(value: Any, path: str = "") -> Iterator[str]:
    """Every place in ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in items:
        if "/" not in str(key):
            yield f"{path}{key}"
            yield from places_in(held, f"{path}{key}/")


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_change_is_one_line_or_harmless(place: Path, experts: Path, data: st.DataObject) -> None:
    place = data.draw(st.sampled_from([place, experts]))
    value = content(place)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places_in(value))))
        outer, _, last = path.rpartition("/")
        held = value
        for key in outer.split("/") if outer else ():
            held = held[int(key) if isinstance(held, list) else key]
        at: Any = int(last) if isinstance(held, list) else last
        match data.draw(st.sampled_from(["replace", "remove", "repeat", "exchange", "add"])):
            case "replace":
                held[at] = data.draw(leaves)
            case "remove":
                del held[at]
            case "repeat" if isinstance(held, list):
                held.append(held[at])
            case "exchange":
                other = data.draw(
                    st.sampled_from(sorted(held, key=str) if isinstance(held, dict) else range(len(held)))
                )
                held[at], held[other] = held[other], held[at]
            case _:
                if isinstance(held, dict):
                    held[data.draw(st.text(max_size=4))] = data.draw(leaves)
    try:
        folder = craft(place, value)
    except (TypeError, ValueError):
        return
    every_use(place, folder)


def test_nesting_is_refused_at_once(place: Path) -> None:
    for text in ('{"a":' * 100_000 + "1" + "}" * 100_000, '{"format_version":1,"a":' + "[" * 100_000):
        (place / "crafted" / MANIFEST).write_text(text)
        for verify in (False, True):
            with (
                mock.patch("tpctl.sharding.proving.damage.undo_flip", side_effect=AssertionError("looked for a flip")),
                pytest.raises(ShardFolderError, match=r"is damaged \(it is nested too deeply\); shard the model again"),
            ):
                load_manifest(place / "crafted", verify=verify)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"format_version":1,"a":[' + "{}," * 9_000_000 + "1]}",
            "holds about 18,000,00. values, but no",
        ),
        ('{"format_version":1,"a":"' + "x" * (manifest_file.LARGEST + 1) + '"}', r"has 67,10.,... bytes, but no"),
    ],
    ids=["many values", "a huge string"],
)
def test_what_is_larger_than_any_manifest_is_not_parsed(place: Path, text: str, said: str) -> None:
    (place / "crafted" / MANIFEST).write_text(text)
    del text
    tracemalloc.start()
    try:
        with pytest.raises(ShardFolderError, match=said):
            load_manifest(place / "crafted")
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_what_could_not_be_read_again_is_not_written(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(manifest_file, "LARGEST", 1000)
    monkeypatch.setattr(writer, "MANY", 0)
    with pytest.raises(ShardFolderError, match=r"the manifest would have .* bytes, more than the 1,000 that are read"):
        shard_checkpoint(place / "model", place / "out", 2)
    assert not (place / "out").exists() and not list(place.glob(".*"))


ESCAPES = "\x1b]0;title\x07\x1b[31mred\x9b2J\nsecond line\u202ereversed"
ESCAPED = r"\x1b]0;title\x07\x1b[31mred\x9b2J\nsecond line\u202ereversed"


@pytest.mark.parametrize(
    "command",
    [
        "inspect-shards crafted",
        "inspect-shards crafted --rank 0",
        "inspect-shards crafted --verify",
        "inspect-shards crafted --json",
        "inspect-shards crafted --html page.html",
        "merge crafted -o out",
        "reshard crafted --tp 3 -o out",
        "shard crafted --tp 3",
    ],
)
def test_what_a_manifest_says_does_not_steer_the_terminal(
    place: Path, command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    craft(place, changed(content(place), "source/id", ESCAPES))
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["tpctl", *command.split()])
    with mock.patch("signal.signal"), pytest.raises(SystemExit):
        main()
    shutil.rmtree(place / "out", ignore_errors=True)
    out, err = capfd.readouterr()
    page = Path("page.html").read_text(encoding="utf-8") if "--html" in command else ""
    for text in (out, err, page):
        assert not set(text) & set("\x1b\x07\x9b\u202e"), text
        assert "\nsecond line" not in text
    if "--json" in command:
        assert json.loads(out)["source"] == ESCAPES
    elif not command.startswith("shard"):
        assert ESCAPED in out
    if page:
        assert ESCAPED in page


def test_a_page_cannot_be_broken_out_of(place: Path) -> None:
    for name in ("</script><script>alert(1)</script>", "<!--<script>", "<img src=x onerror=alert(1)>", "a&b"):
        craft(place, changed(content(place), "source/id", name))
        report = inspect_shards(place / "crafted")
        page = render(report, ModelConfig.load(place / "crafted"))
        assert name not in page
        data = page.split('type="application/json">')[1].split("</script>")[0]
        assert "<" not in data and json.loads(data)["kinds"]

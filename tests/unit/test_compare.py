"""Comparison with the source believes nothing of the manifest: forged folders, whose digests are right, are found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from tests.unit.synthetic import RUN, make_checkpoint, make_config
from tpctl.checkpoint.safetensors import TensorSpec, read_header
from tpctl.errors import CheckpointError, ShardFolderError
from tpctl.manifest.manifest import MANIFEST, Manifest
from tpctl.manifest.records import CopiedFile, ManifestTensor, Shard
from tpctl.sharding.cutting.shard import shard_checkpoint
from tpctl.sharding.showing.inspect import inspect_shards

TABLE = TensorSpec("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (3,))
QKV = "model.layers.0.self_attn.qkv_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = make_config(tie_word_embeddings=True)
    return make_checkpoint(tmp_path_factory.mktemp("compare") / "model", config, files=2, extra=[TABLE])


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """Shards at tp 3 (uneven: rank 2 has two of four query heads), free to be forged."""
    shard_checkpoint(source, tmp_path / "out", 3)
    return tmp_path / "out"


def with_tensor(manifest: Manifest, rank: int, name: str, **changes: object) -> Manifest:
    shard = manifest.shard(rank)
    tensor: ManifestTensor = replace(shard.tensors[name], **changes)  # type: ignore[arg-type]
    shards = {**manifest.shards, rank: replace(shard, tensors={**shard.tensors, name: tensor})}
    return replace(manifest, shards=shards)


def forge(out: Path, rank: int, name: str, edit: Callable[[bytes], bytes], **changes: object) -> None:
    """Change the bytes of a tensor, and the manifest so that it vouches for them."""
    path = out / f"model-rank-{rank}-part-0.safetensors"
    info, raw = read_header(path).tensors[name], path.read_bytes()
    data = edit(raw[info.start : info.stop])
    path.write_bytes(raw[: info.start] + data + raw[info.stop :])
    manifest = with_tensor(Manifest.load(out), rank, name, digest=blake3(data).hexdigest(), **changes)
    (out / MANIFEST).write_text(manifest.text())


def rejected(out: Path, source: Path) -> str:
    """Why ``out`` is not what ``source`` gives; its digests are all right, and its own config tells at most the cut."""
    try:
        inspect_shards(out, verify=True)
    except ShardFolderError as error:
        assert "contradicts itself" in str(error)
    with pytest.raises(ShardFolderError) as caught:
        inspect_shards(out, verify=True, source=source)
    return str(caught.value)


def contradicted(out: Path) -> str:
    """What the manifest in ``out`` says against itself, which needs no source to be seen."""
    with pytest.raises(ShardFolderError, match="contradicts itself") as caught:
        inspect_shards(out, verify=True)
    return str(caught.value)


NOT_FOR_VLLM = (
    *("gemma3", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "gpt_oss"),
    *("kimi_k2", "mistral3", "qwen3_5", "qwen3_5_moe"),
)
"""Which ``--compat vllm`` refuses by name."""


@pytest.mark.daily(2)
@pytest.mark.grid(1, daily=True)
@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize(
    ("family", "compat"),
    [*((family, None) for family in RUN), *((family, "vllm") for family in RUN if family not in NOT_FOR_VLLM)],
)
def test_what_was_cut_honestly_equals_its_source(tmp_path: Path, family: str, compat: str | None, dtype: str) -> None:
    tied = {"tie_word_embeddings": True} if compat and family in ("cohere2", "gemma2") else {}  # vLLM knows no other
    source = make_checkpoint(tmp_path / "model", make_config(family, **tied))
    for tp_size in (1, 2) if compat else (1, 2, 3, 4):
        out = tmp_path / f"tp{tp_size}"
        shard_checkpoint(source, out, tp_size, compat=compat, dtype=dtype)
        verified = inspect_shards(out, verify=True, source=source).verified
        assert verified is not None and verified.compared_bytes == verified.hashed_bytes


def test_swapped_heads_that_the_manifest_vouches_for(out: Path, source: Path) -> None:
    """The forged manifest describes the swap truthfully, so by its own pieces every element equals the source."""
    pieces = Manifest.load(out).tensors(2)[QKV].pieces
    q, rest, head = pieces[0], pieces[1:], 6 * 24 * 2
    assert q.shape == (12, 24)
    swapped = (
        replace(q, start=(18, 0), shape=(6, 24)),
        replace(q, start=(12, 0), shape=(6, 24), at=(6, 0)),
    )
    forge(out, 2, QKV, lambda data: data[head : 2 * head] + data[:head] + data[2 * head :], pieces=(*swapped, *rest))
    assert f"the pieces of {QKV} of rank 2 are not what config.json leads to" in contradicted(out)


def test_swapped_heads_that_the_manifest_hides(out: Path, source: Path) -> None:
    head = 6 * 24 * 2
    forge(out, 2, QKV, lambda data: data[head : 2 * head] + data[:head] + data[2 * head :])
    assert f"{QKV} of rank 2 differs from its source" in rejected(out, source)


def test_padding_that_is_not_zero(out: Path, source: Path) -> None:
    forge(out, 2, "lm_head.weight", lambda data: data[:-2] + b"\1\0")
    assert "lm_head.weight of rank 2 holds something other than 0 at its element" in rejected(out, source)


def test_a_constant_of_another_engine_that_is_not_one(source: Path, tmp_path: Path) -> None:
    shard_checkpoint(source, tmp_path / "out", 2, compat="vllm")
    name = "model.layers.1.self_attn.attn._k_scale"
    forge(tmp_path / "out", 1, name, lambda data: bytes(4))
    assert f"{name} of rank 1 holds something other than 1" in rejected(tmp_path / "out", source)
    forge(tmp_path / "out", 1, name, lambda data: bytes(4), fill=0)
    assert f"the fill of {name} of rank 1 is not what config.json leads to" in contradicted(tmp_path / "out")


def test_tensors_missing_or_too_many(out: Path, source: Path) -> None:
    """The header has to agree with the manifest, so a whole forged part is needed."""
    from hashlib import sha256

    from tpctl.checkpoint.safetensors import build_header

    manifest, name = Manifest.load(out), "model.layers.1.post_attention_layernorm.weight"
    honest = {path.name: path.read_bytes() for path in out.iterdir()}
    other = "model.layers.1.other.weight"
    for new, said in ((None, f"lacks the tensor {name}"), (other, f"has, beyond the model's, the tensor {other}")):
        shards = {}
        for rank, shard in manifest.shards.items():
            part = shard.parts[0]
            infos, raw = read_header(out / part.file).tensors, honest[part.file]
            tensors = {(n if n != name else new or ""): t for n, t in shard.tensors.items() if n != name or new}
            if new:
                tensors = {**tensors, name: shard.tensors[name]}
            header = build_header(TensorSpec(n, t.dtype, t.shape) for n, t in tensors.items())
            data = b"".join(
                raw[infos[n if n != new else name].start : infos[n if n != new else name].stop] for n in header.tensors
            )
            (out / part.file).write_bytes(header.raw + data)
            entry = replace(
                part,
                size=header.file_size,
                header_size=header.size,
                header_sha256=sha256(header.raw).hexdigest(),
            )
            shards[rank] = Shard((entry,), tensors)
        (out / MANIFEST).write_text(replace(manifest, shards=shards).text())
        assert said in contradicted(out)
        for file, content in honest.items():
            (out / file).write_bytes(content)


def test_tensors_that_no_rank_needs(out: Path, source: Path) -> None:
    path = out / "tpctl-extra.safetensors"
    raw, manifest = path.read_bytes(), Manifest.load(out)
    assert manifest.extra is not None
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    tensor = replace(manifest.extra.tensors[TABLE.name], digest=blake3(path.read_bytes()[-12:]).hexdigest())
    forged = replace(manifest, extra=replace(manifest.extra, tensors={TABLE.name: tensor}))
    (out / MANIFEST).write_text(forged.text())
    assert f"{TABLE.name} differs from its source" in rejected(out, source)
    path.unlink()
    (out / MANIFEST).write_text(replace(manifest, extra=None).text())
    assert f"{TABLE.name} is in one of the source and the extra file only" in contradicted(out)


def test_copied_files(out: Path, source: Path) -> None:
    manifest = Manifest.load(out)
    edited = b'{"version": "6.6"}'
    (out / "tokenizer.json").write_bytes(edited)
    files = {**manifest.files, "tokenizer.json": CopiedFile(len(edited), blake3(edited).hexdigest())}
    (out / MANIFEST).write_text(replace(manifest, files=files).text())
    assert "tokenizer.json differs from" in rejected(out, source)
    (out / "tokenizer.json").unlink()
    del files["tokenizer.json"]
    (out / MANIFEST).write_text(replace(manifest, files=files).text())
    assert "lacks tokenizer.json" in rejected(out, source)
    (out / "other.json").write_bytes(edited)
    files |= {"tokenizer.json": manifest.files["tokenizer.json"]}
    files["other.json"] = CopiedFile(len(edited), blake3(edited).hexdigest())
    shutil.copy(source / "tokenizer.json", out)
    (out / MANIFEST).write_text(replace(manifest, files=files).text())
    assert "other.json is not in" in rejected(out, source)


@pytest.mark.parametrize(("tp_size", "model_type"), [(3, "mistral"), (4, "llama")])
def test_another_family_or_size_than_claimed(out: Path, source: Path, tp_size: int, model_type: str) -> None:
    manifest = replace(Manifest.load(out), tp_size=tp_size, model_type=model_type)
    (out / MANIFEST).write_text(manifest.text())
    contradicted(out)


def test_a_file_that_joined_the_source_later_is_no_difference(out: Path, source: Path, tmp_path: Path) -> None:
    later = shutil.copytree(source, tmp_path / "later")
    (later / "README.md").write_text("new")
    inspect_shards(out, source=later)


def test_a_source_that_changed_since(out: Path, source: Path, tmp_path: Path) -> None:
    """The digests match, the source differs: only the comparison with the source can tell."""
    other = shutil.copytree(source, tmp_path / "other")
    path = next(p for p in other.glob("*.safetensors") if any("q_proj" in n for n in read_header(p).tensors))
    raw, header = path.read_bytes(), read_header(path)
    name = next(name for name in header.tensors if name.endswith("q_proj.weight"))
    end = header.tensors[name].stop
    path.write_bytes(raw[: end - 1] + bytes([raw[end - 1] ^ 4]) + raw[end:])
    with pytest.raises(ShardFolderError, match=r"qkv_proj\.weight of rank 2 differs .*row 23, column 23"):
        inspect_shards(out, source=other)
    inspect_shards(out, source=other, ranks=[0, 1])


def test_what_is_not_the_source_at_all(out: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds shards; give --source the checkpoint"):
        inspect_shards(out, source=out)
    phi = make_checkpoint(tmp_path / "phi", make_config("phi3"))
    with pytest.raises(ShardFolderError, match=r"is of a llama model, but .*phi of a phi3"):
        inspect_shards(out, source=phi)
    (phi / "config.json").write_text(Path(out / "config.json").read_text())
    with pytest.raises(CheckpointError, match="has no tensor"):
        inspect_shards(out, source=phi)

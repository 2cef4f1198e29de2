"""For which models ``--compat`` was proven, and how.

``STATE``: at tp 1 and 2 every parameter of every rank has the name, the shape and the value that the engine's own
loader fills it with from the checkpoint, before kernels change any (``examples/engine_state.py``); from there on an
engine cannot tell the two apart. ``TOKENS``: besides, vLLM answered from the shards with the tokens that it gives from
the checkpoint (``examples/vllm_sharded_state.py``), at tp 1, and Llama, Qwen3-MoE and weights of 4 bits at more. All
with random checkpoints on a CPU; where an engine has no kernel there, parameters are made all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TOKENS, STATE = "tokens", "state"


@dataclass(frozen=True)
class Format:
    """A format of weights, and how it was proven in linears and in experts; ``None``: it was not.

    Attributes:
        pattern: of its name.
        entries: the tensors that it has.
        but: families in which it was not, or in which the engine does not load it.
    """

    pattern: str
    entries: frozenset[str]
    dense: str | None
    experts: str | None
    but: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Engine:
    """What an engine was seen to load.

    Attributes:
        families: by ``model_type``, how they were proven with weights in floats.
        formats: of quantised weights, in these families.
        quantised_routers: families in which it quantises routers, unless a config leaves them out.
        no_bias: linears, by the end of their names, that have no bias in it, whatever a config says.
        all_sparse: families of which it gives every layer experts.
        tied: families in which its head is the embedding.
    """

    families: Mapping[str, str]
    formats: tuple[Format, ...] = ()
    quantised_routers: frozenset[str] = frozenset()
    no_bias: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    all_sparse: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()


_DENSE = (
    "cohere2 gemma2 gemma3_text glm4 granite llama ministral3 mistral olmo2 olmo3 phi3 qwen2 qwen3 seed_oss smollm3"
)
_MIXTURES = "deepseek_v3 glm4_moe minimax_m2 mixtral qwen2_moe qwen3_moe"
_DELTA_NETS = "qwen3_5_moe_text qwen3_5_text qwen3_next"
_NOT_BY_NAMES = f"{_MIXTURES} {_DELTA_NETS}"
"""vLLM tells from the names in a folder which linears are in AWQ or GPTQ, and shards have others than checkpoints."""
_ANSWERED = (
    "cohere2 gemma2 gemma3_text glm4 glm4_moe granite llama ministral3 mistral mixtral olmo3 phi3 qwen2 qwen2_moe "
    "qwen3 qwen3_moe seed_oss smollm3"
)
"""Those of them that vLLM was asked with."""
_SGLANG = "glm4 granite llama ministral3 mistral phi3 qwen2 qwen3 qwen3_moe"
_ATTENTION = ("qkv_proj", "o_proj")
_MLP = ("gate_up_proj", "down_proj")


def _format(pattern: str, entries: str, dense: str, experts: str | None = None, but: str = "") -> Format:
    return Format(pattern, frozenset(entries.split()), dense, experts, frozenset(but.split()))


ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
        families={
            **dict.fromkeys(f"{_DENSE} {_MIXTURES} {_DELTA_NETS}".split(), STATE),
            **dict.fromkeys(_ANSWERED.split(), TOKENS),
        },
        formats=(
            _format("FP8 in blocks of 128 x 128", "weight weight_scale_inv", STATE, STATE),
            _format("FP8 in blocks of 128 x 128", "weight weight_scale", STATE, STATE),
            _format("FP8 by channel", "weight weight_scale", TOKENS, STATE),
            _format("FP8 by tensor", "weight weight_scale", STATE),
            _format("FP8 by tensor", "weight weight_scale input_scale", STATE),
            _format("INT8 by channel", "weight weight_scale", TOKENS, STATE),
            _format(r"INT4 in groups of \d+, packed", "weight_packed weight_scale weight_shape", TOKENS, STATE),
            _format(
                r"INT4 in groups of \d+, packed",
                "weight_packed weight_scale weight_zero_point weight_shape",
                TOKENS,
                STATE,
            ),
            _format(r"AWQ in groups of \d+", "qweight qzeros scales", TOKENS, but=_NOT_BY_NAMES),
            _format(r"GPTQ of 4 bits in groups of \d+", "qweight qzeros scales", TOKENS, but=f"{_NOT_BY_NAMES} glm4"),
        ),
        quantised_routers=frozenset({"qwen3_moe"}),
        no_bias={
            "cohere2": _ATTENTION,
            "deepseek_v3": ("fused_qkv_a_proj", "o_proj"),
            **dict.fromkeys(_DELTA_NETS.split(), _ATTENTION),
            "qwen3": ("o_proj",),
            "qwen3_moe": ("o_proj",),
        },
        tied=frozenset({"cohere2", "gemma2"}),
    ),
    "sglang": Engine(
        families=dict.fromkeys(_SGLANG.split(), STATE),
        no_bias={
            "granite": (*_ATTENTION, *_MLP),
            "llama": _MLP,
            "qwen3": _ATTENTION,
            "qwen3_moe": _ATTENTION,
        },
        all_sparse=frozenset({"qwen3_moe"}),
    ),
}
"""What vLLM 0.32 and SGLang 0.5.23 load.

SGLang changes parameters for its kernels before it fills them from shards (``model_loader/loader.py``,
``ShardedStateLoader``), which leaves only those in floats as they are: so no quantised ones are here. Nor are families
in which its parameters depend on the machine (shared experts that on GPUs become one more expert: GLM-4.5, Qwen2), or
in which they are not merged (Seed-OSS, SmolLM3).
"""

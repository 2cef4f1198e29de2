"""At which sizes other engines do not load a model, as rules with their sources.

Read from the released wheels of vLLM 0.33.0 and SGLang 0.5.23 (addresses are files in them, and lines) and from public
issues. Both divide evenly or raise. A rule is about a model as it is published, not about shards of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import gcd

from tpctl.partition.cuts import pad_vocab
from tpctl.planning.divided import Axis, Heads, Scales

ENGINES = {"vllm": "vLLM 0.33.0", "sglang": "SGLang 0.5.23"}
"""Their names and the releases that the rules were read from."""

LEAST_REFINED = 32
"""Features: vLLM makes the scales of an expert's blocks finer, down to this many."""


@dataclass(frozen=True)
class Dealing:
    """A model at a size. ``expert_size``: of the ranks that divide each expert, 1 where experts are whole."""

    tp_size: int
    expert_size: int
    vocab: int
    heads: tuple[Heads, ...]
    axes: tuple[Axis, ...]

    def ranks(self, axis: Axis) -> int:
        return self.expert_size if axis.experts else self.tp_size

    def uneven(self, kind: str, *, experts: bool) -> Iterator[tuple[Axis, int, int]]:
        """Axes of that kind, their lengths, and the ranks that do not divide them."""
        for axis in self.axes:
            if (axis.kind, axis.experts) == (kind, experts):
                for length, ranks in axis.a_rank(self.ranks(axis)):
                    if length % ranks:
                        yield axis, length, ranks

    def torn(
        self, kinds: Iterable[str], kind: str, *, experts: bool, looks: int | None = None
    ) -> Iterator[tuple[Axis, int, int, int]]:
        """Axes of that kind whose scales are of one of ``kinds``, with a length, its ranks, and the unit of a scale
        that the even share is no multiple of.

        Args:
            looks: whether one rank with all of an axis is looked at, too: at all parts but so many last ones.
        """
        for axis in self.axes:
            if (axis.kind, axis.experts) != (kind, experts) or axis.scales is None or axis.scales.kind not in kinds:
                continue
            unit = axis.scales.inp if kind == "rows" else axis.scales.out
            parts = list(axis.a_rank(self.ranks(axis)))
            if self.ranks(axis) == 1:
                parts = [] if looks is None else parts[: len(parts) - looks]
            for length, ranks in parts:
                if length % ranks == 0 and (length // ranks) % unit:
                    yield axis, length, ranks, unit


Broken = Callable[[Dealing], str | None]


@dataclass(frozen=True)
class Rule:
    """Where ``broken`` says something, ``engine`` does not load the model; or, with ``loads``, with a drawback.

    ``name`` is short, for a table; ``source`` says where the engine's code or an issue has it.
    """

    engine: str
    name: str
    broken: Broken
    source: str
    loads: bool = False


@dataclass(frozen=True)
class Objection:
    """What an engine has against a size, in words, and where that is known from."""

    rule: str
    why: str
    source: str
    loads: bool


def _heads(dealt: Dealing) -> str | None:
    for one in dealt.heads:
        if one.query % dealt.tp_size:
            return f"{one.query} heads are not divided by {dealt.tp_size}"
    return None


def _kv_heads(dealt: Dealing) -> str | None:
    for one in dealt.heads:
        if one.kv and not one.recurrent and max(one.kv, dealt.tp_size) % min(one.kv, dealt.tp_size):
            return f"{one.kv} KV heads are neither divided by {dealt.tp_size} nor copied evenly"
    return None


def _key_heads(dealt: Dealing) -> str | None:
    for one in dealt.heads:
        if one.recurrent and one.kv % dealt.tp_size:
            return f"{one.kv} key heads of recurrent layers are not divided by {dealt.tp_size}, but rounded down"
    return None


def _vocabulary(dealt: Dealing) -> str | None:
    padded = pad_vocab(dealt.vocab)
    return (
        f"{padded} rows of the padded vocabulary are not divided by {dealt.tp_size}" if padded % dealt.tp_size else None
    )


def _width(dealt: Dealing) -> str | None:
    for axis, length, ranks in dealt.uneven("rows", experts=False):
        return f"{length} inputs of {axis.name} are not divided by {ranks}"
    return None


def _expert_width(dealt: Dealing) -> str | None:
    for _, length, ranks in dealt.uneven("rows", experts=True):
        return f"the experts' inner size {length} is not divided by {ranks}"
    return None


def _torn(kinds: tuple[str, ...], kind: str, what: str, *, merged: bool = False, looks: int | None = None) -> Broken:
    """Even shares of linears of one part, or of ``merged`` ones, that end inside of ``what``; ``looks`` as ``torn``."""

    def broken(dealt: Dealing) -> str | None:
        for axis, length, ranks, unit in dealt.torn(kinds, kind, experts=False, looks=looks):
            if merged is (len(axis.parts) > 1):
                whole = f"{length // ranks} of {length} {_FEATURES[kind]} of {axis.name}"
                return f"{whole} a rank end in a {what} of {unit}"
        return None

    return broken


def _torn_expert(dealt: Dealing, kinds: tuple[str, ...]) -> tuple[Axis, int, int, int] | None:
    """``Dealing.torn`` of experts: the first, input features before output features, which both engines look at also
    where experts are whole."""
    found = (
        one
        for kind, looks in (("rows", None), ("columns", 0))
        for one in dealt.torn(kinds, kind, experts=True, looks=looks)
    )
    return next(found, None)


def _torn_experts(kinds: tuple[str, ...], what: str) -> Broken:
    """Shares of experts that end inside of ``what``, whose scale is one."""

    def broken(dealt: Dealing) -> str | None:
        if (torn := _torn_expert(dealt, kinds)) is None:
            return None
        _, length, ranks, unit = torn
        if ranks == 1:
            return f"the experts' inner size {length} ends in a {what} of {unit}"
        return f"{length // ranks} of the experts' inner size {length} a rank end in a {what} of {unit}"

    return broken


def _refined(dealt: Dealing) -> tuple[str, int] | None:
    """Why the scales of experts' blocks would have to be finer, and how many features each would then be of."""
    why, torn = _torn_experts(("fp8 native",), "block")(dealt), _torn_expert(dealt, ("fp8 native",))
    if why is None or torn is None:
        return None
    axis, length, ranks, _ = torn
    scales = axis.scales or Scales("", 1, 1)
    return why, gcd(scales.out, scales.inp, length // ranks, axis.other)


def _not_refined(dealt: Dealing) -> str | None:
    if (found := _refined(dealt)) is None or found[1] >= LEAST_REFINED:
        return None
    return f"{found[0]}, which share no part of {LEAST_REFINED} or more"


def _triton_only(dealt: Dealing) -> str | None:
    if (found := _refined(dealt)) is None or found[1] < LEAST_REFINED:
        return None
    return f"{found[0]}; scales are repeated every {found[1]}, which Triton's kernels alone take"


_FEATURES = {"rows": "inputs", "columns": "outputs"}
_FP8 = ("fp8", "fp8 native")
_VLLM, _SGLANG = "vllm/model_executor/layers", "sglang/srt/layers"
_VLLM_FP8 = f"{_VLLM}/quantization/utils/fp8_utils.py"
_VLLM_CT = f"{_VLLM}/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe"
_SGLANG_FP8 = f"{_SGLANG}/quantization/fp8.py"
_SGLANG_CT = f"{_SGLANG}/quantization/compressed_tensors/schemes/compressed_tensors"

_ROWS, _COLUMNS = _torn(_FP8, "rows", "block"), _torn(_FP8, "columns", "block")
_MERGED = _torn(("fp8",), "columns", "block", merged=True, looks=1)
_NATIVE = _torn(("fp8 native",), "columns", "block", merged=True, looks=0)
_GROUPS = _torn(("int", "nvfp4"), "rows", "group")

RULES = (
    Rule("vllm", "heads", _heads, "vllm/config/model.py:1558"),
    Rule("vllm", "KV heads", _kv_heads, f"{_VLLM}/linear.py:1068"),
    Rule("vllm", "key heads", _key_heads, f"{_VLLM}/mamba/gdn/qwen_gdn_linear_attn.py:888"),
    Rule("vllm", "vocabulary", _vocabulary, f"{_VLLM}/vocab_parallel_embedding.py:304"),
    Rule("vllm", "width", _width, "vllm/distributed/utils.py:51"),
    Rule("vllm", "expert width", _expert_width, f"{_VLLM}/fused_moe/config.py:1352"),
    Rule("vllm", "blocks", _ROWS, f"{_VLLM_FP8}:1296; vllm#52997"),
    Rule("vllm", "blocks", _COLUMNS, f"{_VLLM_FP8}:1332"),
    Rule("vllm", "blocks", _MERGED, f"{_VLLM_FP8}:1332"),  # of fp8 native linear.py:562 lets them be
    Rule("vllm", "expert blocks", _torn_experts(("fp8",), "block"), f"{_VLLM_CT}_w8a8_fp8.py:137"),
    Rule("vllm", "expert blocks", _not_refined, f"{_VLLM}/fused_moe/oracle/fp8.py:293, {_VLLM_FP8}:1347"),
    Rule("vllm", "Triton only", _triton_only, f"{_VLLM}/fused_moe/oracle/fp8.py:293", loads=True),
    Rule("vllm", "groups", _GROUPS, "vllm/distributed/utils.py:137; vllm#21695"),
    Rule("vllm", "expert groups", _torn_experts(("int",), "group"), f"{_VLLM_CT}_wna16.py:244"),
    Rule("vllm", "expert groups", _torn_experts(("nvfp4",), "group"), f"{_VLLM_CT}_w4a4_nvfp4.py:138; vllm#49949"),
    Rule("sglang", "heads", _heads, "sglang/srt/models/llama.py:183, qwen3_moe.py:506 and others alike"),
    Rule("sglang", "KV heads", _kv_heads, f"{_SGLANG}/linear.py:1142"),
    Rule("sglang", "key heads", _key_heads, "sglang/srt/models/qwen3_next.py:270"),
    Rule("sglang", "width", _width, f"{_SGLANG}/linear.py:1611"),
    Rule("sglang", "expert width", _expert_width, f"{_SGLANG}/moe/fused_moe_triton/layer.py:427"),
    Rule("sglang", "blocks", _ROWS, f"{_SGLANG_FP8}:594"),
    Rule("sglang", "blocks", _COLUMNS, f"{_SGLANG_FP8}:605"),
    Rule("sglang", "blocks", _MERGED, f"{_SGLANG}/quantization/fp8_utils.py:2887"),
    Rule("sglang", "blocks", _NATIVE, f"{_SGLANG_FP8}:605"),
    Rule("sglang", "expert blocks", _torn_experts(_FP8, "block"), f"{_SGLANG_FP8}:1586"),
    Rule("sglang", "groups", _GROUPS, f"{_SGLANG_CT}_wNa16.py:128, {_SGLANG}/quantization/marlin_utils.py:187"),
    Rule("sglang", "expert groups", _torn_experts(("int", "nvfp4"), "group"), f"{_SGLANG_CT}_wNa16_moe.py:158"),
)
"""One rule a line, in the order in which they are told. SGLang pads a vocabulary to any size, and neither has a rule
for MXFP4: both give each rank whole groups, the last one fewer (vllm/model_executor/models/gpt_oss.py:579,
sglang/srt/models/gpt_oss.py:991)."""


def objections(engine: str, dealt: Dealing) -> tuple[Objection, ...]:
    """What ``engine`` has against a model at a size: the first of each name, in the order of the rules."""
    found: dict[str, Objection] = {}
    for rule in RULES:
        if rule.engine == engine and rule.name not in found and (why := rule.broken(dealt)) is not None:
            found[rule.name] = Objection(rule.name, why, rule.source, rule.loads)
    return tuple(found.values())

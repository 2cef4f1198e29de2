"""A mixture whose shards are damaged."""

from __future__ import annotations

from typing import Any

from tests.unit.synthetic import make_config

CONFIG: dict[str, Any] = make_config(
    "qwen3_moe",
    num_hidden_layers=1,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=40,
    quantization_config={"quant_method": "fp8", "weight_block_size": [16, 8], "activation_scheme": "dynamic"},
)

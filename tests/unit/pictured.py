"""A mixture that is drawn."""

from __future__ import annotations

from tests.unit.synthetic import make_config

MOE = make_config(
    "qwen3_moe",
    num_hidden_layers=3,
    hidden_size=256,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=384,
    mlp_only_layers=[0],
    intermediate_size=512,
    quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
)

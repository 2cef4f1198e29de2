"""OLMo 3: OLMo 2 with a window in three layers of four, and a RoPE for each of the two kinds."""

from __future__ import annotations

from tpctl.arch.families import olmo2
from tpctl.arch.family import Family

FAMILY = Family("Olmo3ForCausalLM", olmo2.DEFAULTS, olmo2.NULLABLE, olmo2.describe, runs=False)

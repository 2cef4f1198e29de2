"""The serving engine: scheduler and KV cache manager (no torch), model runner, sampler, worker."""

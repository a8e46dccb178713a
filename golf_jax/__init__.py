"""golf_jax: Parameter Golf in JAX. Train, pack and score language models of at most 16,000,000 bytes."""

import os

# XLA's CPU runtime loses a task of large programs under its concurrency-optimized schedule and then waits for it forever (jax 0.10.2, 2
# cores, one device and several). XLA reads the flag when the first computation is compiled; the per-program option is ignored.
_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=false".strip()

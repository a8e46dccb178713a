"""golf_jax: Parameter Golf in JAX. Train, pack and score language models of at most 16,000,000 bytes."""

import importlib
import os
import signal
import sys
from typing import Any

__version__ = "0.1.0"

# A command that is still being imported (`python -m golf_jax...`, `golf-jax`): Ctrl-C ends it without a traceback until `cli.run` hears it.
_name = "".join(sys.argv[:1])
_starting = "golf_jax" in " ".join(sys.orig_argv) if _name == "-m" else _name.endswith("/golf-jax")
if _starting:
    # XLA:CPU's QR is OpenBLAS, whose threads wait by spinning: on busy cores the initialisation took half a minute instead of a second.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if _starting and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Strings, not imports: `import golf_jax` must not import jax, and the code that ships with an artifact follows every import statement.
_PUBLIC = {
    "GPT": "golf_jax.model:GPT",
    "load": "golf_jax.opening:load",
    "load_recipe": "golf_jax.config:load_recipe",
    "open_text": "golf_jax.data.text:open_text",
    "run": "golf_jax.pipeline:run",
    "score": "golf_jax.opening:score",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(sorted(_PUBLIC))}")
    module, attribute = _PUBLIC[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])

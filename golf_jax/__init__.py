"""golf_jax: Parameter Golf in JAX. Train, pack and score language models of at most 16,000,000 bytes."""

import importlib
from typing import Any

from golf_jax.starting import begin

__version__ = "0.1.0"

begin()

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

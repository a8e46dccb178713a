"""A model opened for use: from an artifact or a run directory, and scored."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from golf_jax.artifact.container import read_bytes
from golf_jax.artifact.model import load_model
from golf_jax.config import EvalConfig, GolfError, ModelConfig
from golf_jax.data.text import Text
from golf_jax.data.tokenizer import Tokenizer
from golf_jax.evaluation.fixed import evaluate_sliding, evaluate_standard
from golf_jax.evaluation.legality import check_model
from golf_jax.evaluation.score import Result
from golf_jax.evaluation.scorer import Log
from golf_jax.evaluation.ttt import evaluate_ttt
from golf_jax.mesh import make_mesh
from golf_jax.model import logits, nll, resolve
from golf_jax.model.inputs import check_tokens


@dataclass(frozen=True)
class Model:
    """A trained network and how it wants to be scored. Tokens are integers [batch, time]; scores are natural logarithms, float32."""

    name: str
    """Where it comes from."""
    config: ModelConfig
    """Resolved for this machine."""
    params: dict[str, Any]
    """Dequantized, in their storage dtypes."""
    eval: EvalConfig
    seq_len: int
    sha256: str = ""
    tokenizer_sha256: str = ""
    """Of the tokenizer it was trained with; empty where the file does not say."""
    embedded: bool = False
    """Trained on the corpus embedded in Python."""
    tokenizer: Tokenizer | None = None

    @cached_property
    def _on_device(self) -> dict[str, jax.Array]:
        return {name: jnp.asarray(value) for name, value in self.params.items()}

    @cached_property
    def _programs(self) -> tuple[Any, Any]:
        return jax.jit(lambda p, x: logits(self.config, p, x)), jax.jit(lambda p, x, y: nll(self.config, p, x, y))

    def logits(self, tokens: Any) -> jax.Array:
        """Next-token logits [B, T, V] of tokens [B, T]."""
        return self._programs[0](self._on_device, self._checked(tokens))

    def nll(self, tokens: Any) -> jax.Array:
        """Nats of every token but the first [B, T - 1], given those before it, of tokens [B, T]."""
        tokens = self._checked(tokens)
        return self._programs[1](self._on_device, tokens[:, :-1], tokens[:, 1:])

    def _checked(self, tokens: Any) -> jax.Array:
        return check_tokens(self.config, tokens)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with the document start before it."""
        tokenizer = self._tokenizer()
        return [tokenizer.bos_id, *tokenizer.encode(text)]

    def decode(self, tokens: Any) -> str:
        return self._tokenizer().decode(np.asarray(tokens).reshape(-1))

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise GolfError(f"{self.name}: no tokenizer lies beside it; load(path, tokenizer='tokenizer.model')")
        return self.tokenizer


def load(path: str | Path, tokenizer: str | Path = "") -> Model:
    """The model of an artifact file or of a run directory, with its tokenizer where one lies beside it or is given.

    Raises GolfError naming the file: damaged, not an artifact, another tokenizer than the one it was trained with.
    """
    folder = Path(path)
    file = folder / "artifact.golf" if folder.is_dir() else folder
    if folder.is_dir() and not file.exists():
        raise GolfError(f"{folder}: holds no artifact.golf; go on with the run first: python -m golf_jax.train --resume {folder}")
    data = read_bytes(file)
    try:
        m = load_model(data)
    except GolfError as error:
        raise GolfError(f"{file}: {error}") from None
    config = resolve(m.config, jax.default_backend())
    digest = hashlib.sha256(data).hexdigest()
    beside = file.with_name("tokenizer.model")
    opened = Tokenizer(tokenizer) if tokenizer else Tokenizer(beside) if beside.is_file() else None
    model = Model(str(file), config, m.params, m.eval, m.seq_len, digest, m.tokenizer_sha256, m.embedded)
    return replace(model, tokenizer=opened and fitting(model, opened))


def fitting(model: Model, tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, if it is the one that `model` was trained with. Raises GolfError."""
    if tokenizer.vocab_size != model.config.vocab_size:
        pieces = f"{tokenizer.vocab_size} pieces, {model.name} has a vocabulary of {model.config.vocab_size}"
        raise GolfError(f"tokenizer {tokenizer.name}: {pieces}; give the tokenizer it was trained with")
    if model.tokenizer_sha256 and tokenizer.sha256 != model.tokenizer_sha256:
        hashes = f"SHA-256 {tokenizer.sha256[:12]}..., {model.name} was trained with {model.tokenizer_sha256[:12]}..."
        raise GolfError(f"tokenizer {tokenizer.name}: {hashes}; give the tokenizer it was trained with")
    return tokenizer


def evaluate(
    model: Model, text: Text, mesh: Mesh, eval: EvalConfig, *, log: Log, skip: tuple[str, ...] = ()
) -> Iterator[tuple[str, Result]]:
    common: dict[str, Any] = {"seq_len": model.seq_len, "mesh": mesh, "eval": eval, "log": log}
    runs: dict[str, Any] = {"standard": evaluate_standard}
    if eval.stride:
        runs["sliding"] = evaluate_sliding
    if eval.ttt.kind != "off":
        runs["ttt"] = lambda *a, **k: evaluate_ttt(*a, **k)[0]
    causal, error = check_model(model.config, model.params, text.val_tokens, mesh, model.seq_len)
    for name, function in runs.items():
        if name not in skip:
            result = function(model.config, model.params, text.val_tokens, text.tables, **common)
            yield name, replace(result, facts=replace(result.facts, causal=causal, normalization_error=error))


def score(model: Model, text: Text, *, log: Log = print) -> dict[str, Result]:
    """Every evaluation that the model's recipe asks for, on all devices of this process: name -> result."""
    return dict(evaluate(model, text, make_mesh(), model.eval, log=log))

"""A model opened for use: from an artifact or a run directory, and scored."""

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.artifact.container import MAX_FILE_BYTES
from golf_jax.artifact.model import load_model
from golf_jax.config import EvalConfig, GolfError, ModelConfig, named
from golf_jax.data.identity import trained_on
from golf_jax.data.text import Text, open_text
from golf_jax.data.tokenizer import Tokenizer
from golf_jax.evaluation import Result
from golf_jax.evaluation import score as score_by_methods
from golf_jax.files import read_bytes
from golf_jax.mesh import make_mesh
from golf_jax.model import Model as Network
from golf_jax.model import logits, nll, resolve
from golf_jax.model.inputs import check_tokens
from golf_jax.options import Sampling
from golf_jax.progress import Log
from golf_jax.training.resume import stored_recipe
from golf_jax.training.rundir import go_on
from golf_jax.training.runfiles import read_stages


@dataclass(frozen=True)
class Model(Network):
    """A trained network and how it wants to be scored. Tokens are integers [batch, time]; scores are natural logarithms, float32."""

    name: str = ""
    """Where it comes from."""
    eval: EvalConfig = EvalConfig()
    seq_len: int = 2048
    sha256: str = ""
    tokenizer_sha256: str = ""
    """Of the tokenizer it was trained with; empty where the file does not say."""
    embedded: bool = False
    """Trained on the corpus embedded in Python."""
    tokenizer: Tokenizer | None = None
    asked: ModelConfig | None = None
    """The configuration with its `auto`s, as it was made."""

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

    @cached_property
    def _decoder(self) -> Any:
        return import_module("golf_jax.model.decode").Decoder(self, self.seq_len)  # by name: the code of a run does not write text

    def stream(self, tokens: Sequence[int], sampling: Sampling = Sampling()) -> Iterator[int]:  # noqa: B008 - frozen
        """Tokens that follow `tokens`, without an end."""
        return self._decoder.stream(tokens, sampling)

    def generate(self, prompt: str = "", max_tokens: int = 256, **sampling: Any) -> str:
        """Text that follows the prompt, to the end of the document or `max_tokens`.

        sampling: temperature, top_k, top_p, seed (`golf_jax.options.Sampling`).
        """
        tokens = islice(self.stream(self.encode(prompt), Sampling(**sampling)), max_tokens)
        return self.decode(list(takewhile(lambda token: token != self._tokenizer().bos_id, tokens)))

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with the document start before it."""
        tokenizer = self._tokenizer()
        return [tokenizer.bos_id, *tokenizer.encode(text)]

    def decode(self, tokens: Any) -> str:
        return self._tokenizer().original(np.asarray(tokens).reshape(-1), strict=False)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise GolfError(f"{self.name}: no tokenizer lies beside it; give --tokenizer MODEL, in Python load(path, tokenizer=MODEL)")
        return self.tokenizer


def opened_here(config: ModelConfig, params: Any, **facts: Any) -> Model:
    """A model with its `auto` resolved for this machine and its parameters looked at (see `golf_jax.model.Model.open`).

    Backends of the machine that made the model, which are no part of the model, are exchanged where this one lacks them, and no others;
    that is said on stderr.
    """
    here = _exchanged(config, (("mlp",), ("attention",), ("attention", "mlp")), str(facts["name"]))
    with named(str(facts["name"])):
        network = Network.open(here, params, jax.default_backend())
    return Model(network.config, network.params, network.looping, asked=config, **facts)


def with_attention(model: Model, attention: str) -> Model:
    """`model` as this attention backend computes it. Raises GolfError where that does not run here; an MLP that needs another one is
    exchanged, which is said on stderr."""
    config = replace(model.asked or model.config, attention=attention)
    return replace(model, config=resolve(_exchanged(config, (("mlp",),), model.name), jax.default_backend()), asked=config)


def _exchanged(config: ModelConfig, groups: Sequence[Sequence[str]], name: str) -> ModelConfig:
    """`config`, or where that does not run here, with `auto` for the first of `groups` of its fields with which it does."""
    platform = jax.default_backend()
    try:
        resolve(config, platform)
        return config
    except GolfError as why:
        for fields in groups:
            other = replace(config, **dict.fromkeys(fields, "auto"))
            with contextlib.suppress(GolfError):
                here = resolve(other, platform)
                made = " and ".join(f"{field} {getattr(config, field)}" for field in fields if getattr(config, field) != "auto")
                now = list(dict.fromkeys(getattr(here, field) for field in fields))
                computed = f"{' and '.join(now)} compute{'s' * (len(now) == 1)} it on this {platform}"
                print(f"{name}: made with {made}; {computed} ({why})", file=sys.stderr)
                return other
        raise


def load(path: str | Path, tokenizer: str | Path = "") -> Model:
    """The model of an artifact file or of a run directory, with its tokenizer where one lies beside it or is given.

    Raises GolfError naming the file: damaged, not an artifact, another tokenizer than the one it was trained with.
    """
    folder = Path(path)
    file = folder / "artifact.golf" if folder.is_dir() else folder
    if folder.is_dir() and not file.exists():
        run = (folder / "config.json").exists()
        first = f"go on with the run first: {go_on(folder)}" if run else "give an artifact, or the directory of a run"
        raise GolfError(f"{folder}: holds no artifact.golf; {first}")
    data = read_bytes(file, MAX_FILE_BYTES)
    beside = file.with_name("tokenizer.model")
    return open_artifact(data, str(file), Tokenizer(tokenizer) if tokenizer else Tokenizer(beside) if beside.is_file() else None)


def open_artifact(data: bytes, name: str, tokenizer: Tokenizer | None) -> Model:
    """The model of an artifact's bytes; `name` stands in errors. Raises GolfError as `load` does."""
    with named(name):
        m = load_model(data)
    facts = {"eval": m.eval, "seq_len": m.seq_len, "tokenizer_sha256": m.tokenizer_sha256, "embedded": m.embedded}
    model = opened_here(m.config, m.params, name=name, sha256=hashlib.sha256(data).hexdigest(), **facts)
    return replace(model, tokenizer=tokenizer and fitting(model, tokenizer))


def fitting(model: Model, tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, if it is the one that `model` was trained with. Raises GolfError."""
    if tokenizer.vocab_size != model.config.vocab_size:
        pieces = f"{tokenizer.vocab_size} pieces, {model.name} has a vocabulary of {model.config.vocab_size}"
        raise GolfError(f"tokenizer {tokenizer.name}: {pieces}; give the tokenizer it was trained with")
    if model.tokenizer_sha256 and tokenizer.sha256 != model.tokenizer_sha256:
        hashes = f"SHA-256 {tokenizer.sha256[:12]}..., {model.name} was trained with {model.tokenizer_sha256[:12]}..."
        raise GolfError(f"tokenizer {tokenizer.name}: {hashes}; give the tokenizer it was trained with")
    return tokenizer


def score(model: Model, text: Text, *, log: Log = print) -> dict[str, Result]:
    """Every evaluation that the model's recipe asks for, on all devices of this process: name -> result."""
    results = score_by_methods(model, text, make_mesh(), model.eval, log, seq_len=model.seq_len)
    return {result.mode: result for result in results}


def text_for(model: Model, val: str = "", tokenizer: str = "") -> Text:
    """What the model is scored on: as given (a glob, a SentencePiece model), else as its run directory says, else the embedded corpus.

    Files that the run was trained on are told among the facts, whatever their names.
    """
    beside = Path(model.name).with_name("config.json")
    if not val and not model.embedded and beside.is_file():
        val = stored_recipe(beside.parent).data.val
    if not tokenizer and model.tokenizer and val:
        tokenizer = model.tokenizer.name
    if not val and not tokenizer and model.embedded:
        return open_text("embedded", "", "", model.config.vocab_size, model.seq_len)
    if not val or not tokenizer:
        raise GolfError("give the validation shards and their tokenizer: --val 'GLOB' --tokenizer MODEL")
    text = open_text("", val, tokenizer, model.config.vocab_size, model.seq_len, sha256=model.tokenizer_sha256)
    trained = read_stages(beside.parent).get("text")
    found = trained_on(trained, text.identity) if trained else ""
    return replace(text, facts=(*text.facts, found)) if found else text

"""A trained model as an artifact, and back: parameters -> tensors -> integer codes -> bytes -> parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golf_jax.artifact.codecs import ArtifactError
from golf_jax.artifact.container import pack, read_bytes, unpack
from golf_jax.artifact.ledger import Ledger, ledger
from golf_jax.config import CAP_BYTES, EvalConfig, GolfError, ModelConfig, QuantConfig, Recipe, from_dict, to_dict
from golf_jax.model.params import from_tensors, to_tensors
from golf_jax.quant import QTensor
from golf_jax.quant.fit import FitReport, fit_to_cap
from golf_jax.quant.schemes import dequantize_all


@dataclass(frozen=True)
class Packed:
    """The artifact and how it came to be."""

    data: bytes
    ledger: Ledger
    quant: QuantConfig
    """The recipe's rules, coarser where that was needed to land under the cap."""
    fit: FitReport


@dataclass(frozen=True)
class Loaded:
    """What an artifact holds: all that evaluation needs besides the tokenizer and the text."""

    header: dict[str, Any]
    config: ModelConfig
    params: dict[str, np.ndarray]
    """Dequantized, in their storage dtypes."""
    eval: EvalConfig
    seq_len: int
    tokenizer_sha256: str
    embedded: bool
    """Trained on the corpus embedded in Python."""


def pack_model(
    recipe: Recipe,
    params: Mapping[str, Any],
    tokenizer_sha256: str,
    *,
    code_bytes: int,
    hessians: Mapping[str, np.ndarray] | None = None,
    score: Callable[[dict[str, np.ndarray]], float] | None = None,
) -> Packed:
    """Quantize and pack; steps grow by one factor if code and model would exceed the cap. `code_bytes`: what the code takes of it.

    score: bits per byte of dequantized parameters, asked for only if the steps had to grow: the report then says what that cost.

    Raises GolfError if no step within reason fits.
    """
    tensors = to_tensors(recipe.model, params)
    header = {
        "name": recipe.name,
        "model": _changed(recipe.model),
        "eval": _changed(recipe.eval),
        "seq_len": recipe.data.seq_len,
        "tokenizer_sha256": tokenizer_sha256,
        "embedded": recipe.data.train == "embedded",
    }
    encoded: dict[int, bytes] = {}

    def encode(qtensors: dict[str, QTensor]) -> int:
        data = pack(header, qtensors, recipe.quant.compressor, recipe.quant.level)
        encoded[len(data)] = data
        return len(data)

    def bpb(qtensors: dict[str, QTensor]) -> float:
        assert score is not None
        return score(from_tensors(recipe.model, dequantize_all(qtensors)))

    quant, _, fit = fit_to_cap(tensors, recipe.quant, CAP_BYTES - code_bytes, encode, hessians=hessians, score=bpb if score else None)
    data = encoded[fit.encoded_bytes]
    return Packed(data, ledger(data, code_bytes), quant, fit)


def load_model(source: str | Path | bytes) -> Loaded:
    """The model of an artifact file or its bytes. Raises ArtifactError naming what is wrong with it."""
    header, qtensors = unpack(source if isinstance(source, bytes) else read_bytes(source))
    try:
        config = from_dict(ModelConfig, header["model"], "header.model")
        params = from_tensors(config, dequantize_all(qtensors))
        return Loaded(
            header=header,
            config=config,
            params=params,
            eval=from_dict(EvalConfig, header["eval"], "header.eval"),
            seq_len=int(header["seq_len"]),
            tokenizer_sha256=str(header["tokenizer_sha256"]),
            embedded=bool(header["embedded"]),
        )
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"artifact header: field {error} is missing or has the wrong type") from None
    except GolfError as error:
        raise error if isinstance(error, ArtifactError) else ArtifactError(f"artifact: {error}") from None


def _changed(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults: every byte of the header counts."""
    mine, default = to_dict(config), to_dict(type(config)())
    return {k: v for k, v in mine.items() if v != default[k]}

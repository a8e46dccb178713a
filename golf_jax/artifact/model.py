"""A trained model as an artifact, and back: parameters -> tensors -> integer codes -> bytes -> parameters."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from golf_jax.artifact.calibration import calibrated
from golf_jax.artifact.codecs import ArtifactError
from golf_jax.artifact.compressors import compressor
from golf_jax.artifact.container import FACTORS, inspect, pack, tensors_of
from golf_jax.artifact.ledger import ByteLedger, estimate_bytes, ledger
from golf_jax.config import CAP_BYTES, EvalConfig, ModelConfig, QuantConfig, Recipe, from_dict, to_dict
from golf_jax.config.base import check
from golf_jax.model.params import from_tensors, leaves, tensor_names, to_tensors
from golf_jax.progress import Log
from golf_jax.quant import QTensor, check_quant, dequantize_all, rules_for
from golf_jax.quant.fit import FitReport, fit_to_cap
from golf_jax.quant.rules import match_rule


@dataclass(frozen=True)
class Packed:
    """The artifact and how it came to be."""

    data: bytes
    ledger: ByteLedger
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


def check_packing(recipe: Recipe) -> None:
    """Raises GolfError unless the model can be packed by the recipe's rules and compressor, as far as that is known without weights."""
    compressor(recipe.quant.compressor, recipe.quant.level)
    everything = ModelConfig(
        num_layers=recipe.model.num_layers,
        bigram_buckets=2,
        trigram="table",
        trigram_buckets=2,
        smear_gate=True,
        value_embed_layers=(0,),
        value_residual=True,
        head_gate="linear",
        skip="gated",
    )
    check_quant(rules_for(recipe.model, recipe.quant), tensor_shapes(recipe.model), tensor_shapes(everything), calibrated(recipe.model))


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model, by name."""
    table = leaves(config)
    return {tensor: table[name].tensor_shape() for tensor, (name, _) in tensor_names(config).items()}


def scheme_packed(model: ModelConfig, quant: QuantConfig) -> str:
    """The scheme that names the artifact in the challenge's log lines: of the last of the rules that claims a tensor of this model."""
    rules, shapes = rules_for(model, quant), tensor_shapes(model)
    claimed = [match_rule(rules, name, math.prod(shape), model.num_layers) for name, shape in shapes.items()]
    return max(claimed, key=rules.rules.index).scheme


def pack_model(
    recipe: Recipe,
    params: Mapping[str, Any],
    tokenizer_sha256: str,
    text_digest: str = "",
    *,
    code_bytes: int,
    hessians: Mapping[str, np.ndarray] | None = None,
    score: Callable[[dict[str, np.ndarray]], float] | None = None,
    log: Log | None = None,
) -> Packed:
    """Quantize and pack; steps grow by one factor if code and model would exceed the cap. `code_bytes`: what the code takes of it.

    text_digest: identity of shards and tokenizer (`golf_jax.data.identity`), kept in the header.
    score: bits per byte of dequantized parameters, asked for only if the steps had to grow: the report then says what that cost.

    Raises GolfError if no step within reason fits.
    """
    check_packing(recipe)
    tensors = to_tensors(recipe.model, params)
    header = {
        "name": recipe.name,
        "model": _changed(recipe.model),
        "eval": _changed(recipe.eval),
        "seq_len": recipe.data.seq_len,
        "tokenizer_sha256": tokenizer_sha256,
        "text": text_digest,
        "embedded": recipe.data.train == "embedded",
    }

    def encode(qtensors: dict[str, QTensor]) -> bytes:
        return pack(header, qtensors, recipe.quant.compressor, recipe.quant.level)

    def bpb(qtensors: dict[str, QTensor]) -> float:
        assert score is not None
        return score(from_tensors(recipe.model, dequantize_all(qtensors)))

    rules, budget = rules_for(recipe.model, recipe.quant), CAP_BYTES - code_bytes - max(recipe.quant.margin, 0)
    quant, data, fit = fit_to_cap(
        tensors,
        rules,
        budget,
        encode,
        hessians=hessians,
        score=bpb if score else None,
        estimate=lambda q: estimate_bytes(q, recipe.quant.compressor),
        log=log,
    )
    return Packed(data, ledger(data, code_bytes), quant, fit)


def load_model(data: bytes) -> Loaded:
    """The model of an artifact's bytes.

    Raises ArtifactError naming what is wrong with it. The configuration is compared with the tensor table before a tensor is decompressed.
    """
    opened = inspect(data)
    loaded = describe(opened.header, {e.name: e.shape for e in opened.entries if not e.name.endswith(FACTORS)})
    return replace(loaded, params=from_tensors(loaded.config, dequantize_all(tensors_of(opened))))


def describe(header: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Loaded:
    """What a header says of a model whose tensors have these shapes; no parameters yet. Raises ArtifactError."""
    try:
        loaded = Loaded(
            header=header,
            config=from_dict(ModelConfig, header["model"], "header.model"),
            params={},
            eval=from_dict(EvalConfig, header["eval"], "header.eval"),
            seq_len=_typed(header, "seq_len", int),
            tokenizer_sha256=_typed(header, "tokenizer_sha256", str),
            embedded=_typed(header, "embedded", bool),
        )
        for name in {"name", *header.keys() & {"text"}}:  # the text is not told by the first of such files
            _typed(header, name, str)
        _check_header(loaded, shapes)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"artifact header: field {str(error)[:100]} is missing or has the wrong type") from None
    except (ValueError, ArithmeticError) as error:  # a GolfError too
        raise ArtifactError(f"artifact: {str(error)[:500]}") from None
    return loaded


def _typed(header: dict[str, Any], name: str, kind: type) -> Any:
    if type(header[name]) is not kind:
        raise TypeError(name)
    return header[name]


def _check_header(loaded: Loaded, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises GolfError if what the header says is impossible or not what the tensor table holds; costs no more than the table."""
    c = loaded.config
    check(0 < loaded.seq_len < 1 << 24, f"header.seq_len {loaded.seq_len} is no sequence length")
    check(bool(re.fullmatch("[0-9a-f]{64}", loaded.tokenizer_sha256)), "header.tokenizer_sha256 is no SHA-256")
    loaded.eval.check_length(loaded.seq_len)
    needed = tensor_shapes(c)
    for name in [*found, *needed]:
        check(name in needed, f"the tensors do not fit the model configuration: unknown {name}")
        check(name in found, f"the tensors do not fit the model configuration: missing {name}")
        check(found[name] == needed[name], f"tensor {name} has shape {found[name]}, the model configuration needs {needed[name]}")


def _changed(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults: every byte of the header counts."""
    mine, default = to_dict(config), to_dict(type(config)())
    return {k: v for k, v in mine.items() if v != default[k]}

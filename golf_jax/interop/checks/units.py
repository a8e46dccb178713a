"""Single parts against stored vectors: a table from kind to function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.interop.checks.forward import activations, hash_ids
from golf_jax.interop.checks.reference import Arrays, Case, NotComputed
from golf_jax.interop.packed import unshuffle_bytes
from golf_jax.kernels.attention.xsa import exclude_self_value
from golf_jax.kernels.fake_quant import RowScheme, fake_quant
from golf_jax.model import layers as ops
from golf_jax.model.gpt import attention, resolve
from golf_jax.model.params import leaves
from golf_jax.quant.rounding import sorted_rows, torch_quantile

Outputs = dict[str, Any]


def check_units(case: Case) -> None:
    kind = case.settings["kind"]
    if kind not in KINDS:
        raise NotComputed(f"units of kind {kind!r} have no counterpart here")
    case.compare({f"out/{name}": x for name, x in KINDS[kind](case, case.under("in/")).items()})


def _tables(case: Case, length: int, head_dim: int = 0) -> tuple[jax.Array, jax.Array]:
    c = case.model
    return ops.rope_tables(length, c.rope_dims or head_dim or c.head_dim, c.rope_base, c.rope_train_len, c.rope_bf16_frequencies)


def _rope_tables(case: Case, _: Arrays) -> Outputs:
    cos, sin = _tables(case, case.settings["length"])
    return {"cos": cos, "sin": sin}


def _rope(case: Case, given: Arrays) -> Outputs:
    x = jnp.asarray(given["x"])
    return {"y": ops.rope(x, *_tables(case, x.shape[1], x.shape[-1]))}


def _attention(case: Case, given: Arrays) -> Outputs:
    """One layer with weights in the challenge's orientation; `A @ B` where a weight is stored as its factors."""
    config, layer = resolve(case.model, jax.default_backend()), case.settings["layer"]
    names = {leaf.tensor.removeprefix("blocks.{i}.attn."): name for name, leaf in leaves(config).items() if leaf.per_layer}
    w = {names[n]: jnp.asarray(x.T if x.ndim == 2 else x) for n, x in given.items() if n in names}
    taps: dict[str, jax.Array] = {}
    x, v0, embed = (jnp.asarray(given[k]) if k in given else None for k in ("x", "v0", "value_embed"))
    assert x is not None
    tap = lambda name, value: taps.__setitem__(f"0/{layer}/{name}", value)  # noqa: E731
    out, _ = attention(config, layer, w, x, v0, embed, _tables(case, x.shape[1]), None, tap)
    found = activations({k: np.asarray(v) for k, v in taps.items()})
    return {k.removeprefix("0/"): v for k, v in found.items()} | {"attn_out": out}


def _xsa(case: Case, given: Arrays) -> Outputs:
    return {"y": exclude_self_value(jnp.asarray(given["y"]), jnp.asarray(given["v"]))}


def _hash(case: Case, given: Arrays) -> Outputs:
    return {k.removeprefix("ids/"): v for k, v in hash_ids(case.model, given["tokens"]).items()}


def _fake_quant(case: Case, given: Arrays) -> Outputs:
    s, w = case.settings, jnp.asarray(given["w"])
    grid = RowScheme(s["levels"], s["low"], absmax_floor=s["absmax_floor"])
    out, pull = jax.vjp(lambda w: fake_quant(w, grid, axis=1), w)
    column = jnp.arange(w.shape[1], dtype=jnp.float32)
    return {"w": out, "grad": pull(jnp.broadcast_to(column, w.shape))[0]}


def _quantile(case: Case, given: Arrays) -> Outputs:
    rows = sorted_rows(given["w"])
    return {"rows": np.stack([torch_quantile(rows, q) for q in case.settings["q"]])}


def _byte_shuffle(case: Case, given: Arrays) -> Outputs:
    """The reader's direction: what the script shuffled comes out as it went in."""
    found = np.frombuffer(unshuffle_bytes(case.own["out/data"].tobytes()), np.uint8)
    case.add("out/data", found, given["data"])
    return {}


KINDS: dict[str, Callable[[Case, Arrays], Outputs]] = {
    "rope_tables": _rope_tables, "rope": _rope, "attention": _attention, "xsa": _xsa, "hash_ids": _hash, "fake_quant": _fake_quant,
    "quantile": _quantile, "byte_shuffle": _byte_shuffle,
}  # fmt: skip

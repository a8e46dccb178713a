"""Single parts against stored vectors: a table from kind to function."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import GolfError
from golf_jax.data import caseops
from golf_jax.data.loader import document_segments
from golf_jax.data.sidecar import encode_counted
from golf_jax.data.tokenizer import Tokenizer
from golf_jax.interop.checks import scoring_units
from golf_jax.interop.checks.forward import activations, hash_ids
from golf_jax.interop.checks.reference import BOS, Arrays, Case, NotComputed
from golf_jax.interop.checks.schedule import padded_starts, row_starts
from golf_jax.interop.packed import unshuffle_bytes
from golf_jax.kernels.attention.xsa import exclude_self_value
from golf_jax.kernels.cross_entropy import soft_cap, softcap_cross_entropy
from golf_jax.kernels.fake_quant import RowScheme, fake_quant
from golf_jax.model import layers as ops
from golf_jax.model.gpt import attention, mlp, resolve
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


def _fake_quant(case: Case, given: Arrays) -> Outputs:
    s, w = case.settings, jnp.asarray(given["w"])
    grid = RowScheme(s["levels"], s["low"], absmax_floor=s["absmax_floor"])
    out, pull = jax.vjp(lambda w: fake_quant(w, grid, axis=1), w)
    column = jnp.arange(w.shape[1], dtype=jnp.float32)
    return {"w": out, "grad": pull(jnp.broadcast_to(column, w.shape))[0]}


def _byte_shuffle(case: Case, given: Arrays) -> Outputs:
    """The reader's direction: what the script shuffled comes out as it went in."""
    found = np.frombuffer(unshuffle_bytes(case.own["out/data"].tobytes()), np.uint8)
    case.add("out/data", found, given["data"])
    return {}


def _packed_attention(case: Case, given: Arrays) -> Outputs:
    """PR 2135's head: one packed row, with and without segments."""
    s, x = case.settings, jnp.asarray(given["x"])
    heads = {"num_heads": s["heads"], "num_kv_heads": s["kv_heads"], "rope_dims": s["rope_dims"], "head_gate_scale": s["gate_scale"]}
    config = replace(case.model, width=x.shape[-1], gate_window=given["attn_gate_w"].shape[-1], **heads)
    config = resolve(config, jax.default_backend(), documents=True)
    weights = {name: given[f"{name}_a"] @ given[f"{name}_b"] for name in ("c_q", "c_k", "c_v", "proj")}
    names = {"c_q": "q", "c_k": "k", "c_v": "v", "proj": "o"}
    w = {names[name]: jnp.asarray(x.T) for name, x in weights.items()}
    w |= {"narrow_gate": jnp.asarray(given["attn_gate_w"].T), "q_gain": jnp.asarray(given["q_gain"])}
    rope = ops.rope_tables(x.shape[1], config.rope_dims, config.rope_base, 0, False)
    starts = np.isin(np.arange(x.shape[1]), given["cu_seqlens"])[None]
    first_BT = ops.first_visible(jnp.asarray(np.cumsum(starts, axis=1, dtype=np.int32)))

    def out(sight: Any) -> jax.Array:
        return attention(config, config.num_layers - 1, w, x, None, None, rope, None, lambda name, value: None, sight)[0]

    return {"attn_out": out((first_BT, None)), "attn_out_unsegmented": out(None)}


def _softcap_ce(case: Case, given: Arrays) -> Outputs:
    """The head's loss of logits: they are the states, the table is the identity."""
    logits, targets, softcap = jnp.asarray(given["logits"]), jnp.asarray(given["targets"]), case.settings["softcap"]
    table = jnp.eye(logits.shape[-1])
    nll, pull = jax.vjp(lambda x: softcap_cross_entropy(x, table, targets, softcap=softcap), logits)
    return {"nll": nll, "grad_logits": pull(jnp.ones_like(nll))[0]}


def _asym_softcap(case: Case, given: Arrays) -> Outputs:
    raw, key = (given["z"], "y") if "z" in given else (given["logits"], "logits")
    caps = given["caps"] if "caps" in given else (case.settings["softcap_pos"], case.settings["softcap_neg"])
    return {key: soft_cap(jnp.asarray(raw), (jnp.float32(caps[0]), jnp.float32(caps[1])))}


def _leaky_mlp(case: Case, given: Arrays) -> Outputs:
    x, up, down = (jnp.asarray(given[name]) for name in ("x", "up", "down"))
    y, pull = jax.vjp(lambda x, up, down: mlp(case.model, {"up": up.T, "down": down.T}, x), x, up, down)
    return {"y": y} | dict(zip(("grad_x", "grad_up", "grad_down"), pull(jnp.asarray(given["weights"])), strict=True))


def _cu_seqlens(case: Case, given: Arrays) -> Outputs:
    """The loader's segments of a row whose documents start where the case says."""
    length, limit, bucket = (int(n) for n in given["length_limit_bucket"])
    tokens = np.zeros((1, length), int)
    tokens[0, given.get("starts", np.zeros(0, int))] = 1
    starts = row_starts(document_segments(tokens, 1, limit or length)[0])
    return {"cu_seqlens": padded_starts([[starts]], length, bucket)[0, 0], "longest": max(np.diff([*starts, length]))}


def _rope_bf16(case: Case, given: Arrays) -> Outputs:
    dims, positions = 2 * case.own["out/inv_freq"].shape[0], given["positions"]
    cos, sin = (np.asarray(t) for t in ops.rope_tables(int(positions.max()) + 1, dims, case.model.rope_base, 0, True))
    frequencies = ops.rope_frequencies(dims, case.model.rope_base, True)
    return {"inv_freq": frequencies, "cos": cos[positions], "sin": sin[positions]}


def _text(raw: np.ndarray) -> str:
    return raw.tobytes().decode()


def _caseops(case: Case, given: Arrays) -> Outputs:
    """Text to text and back, then to tokens."""
    text, coded = _text(given["text"]), _text(case.own["out/text"])
    case.add("out/text", np.frombuffer(caseops.encode(text).encode(), np.uint8), case.own["out/text"])
    if caseops.decode(coded) != text:
        raise GolfError(f"{case.refs.path}: {case.where}: {coded[:40]!a} does not decode to {text[:40]!a}")
    return _caseops_bytes(case, given)


def _caseops_bytes(case: Case, given: Arrays) -> Outputs:
    """Tokens of a text, and how many bytes of the original each stands for. No set holds the tokenizer."""
    if not case.refs.tokenizer:
        raise NotComputed("tokens need the script's tokenizer: --tokenizer MODEL")
    tokens, counts = next(encode_counted(Tokenizer(case.refs.tokenizer), [_text(given["text"])]))
    start = int(case.own["out/tokens"][0] != BOS)  # kept with or without the document's start
    return {"tokens": tokens[start:], "bytes": counts[start:]}


def _caseops_bad(case: Case, given: Arrays) -> Outputs:
    try:
        found = f"decodes to {caseops.decode(_text(given['text']))!a}"
    except GolfError:
        found = "refused"
    case.add("out", found == "refused", True)
    return {}


KINDS: dict[str, Callable[[Case, Arrays], Outputs]] = {
    "rope_tables": lambda case, given: dict(zip(("cos", "sin"), _tables(case, case.settings["length"]), strict=True)),
    "rope": lambda case, given: {"y": ops.rope(jnp.asarray(given["x"]), *_tables(case, given["x"].shape[1], given["x"].shape[-1]))},
    "xsa": lambda case, given: {"y": exclude_self_value(given["y"], given["v"])},
    "hash_ids": lambda case, given: {k.removeprefix("ids/"): v for k, v in hash_ids(case.model, given["tokens"]).items()},
    "quantile": lambda case, given: {"rows": np.stack([torch_quantile(sorted_rows(given["w"]), q) for q in case.settings["q"]])},
    "caseops_decode": lambda case, given: {"text": np.frombuffer(caseops.decode(_text(given["text"])).encode(), np.uint8)},
    "attention": _attention, "fake_quant": _fake_quant, "byte_shuffle": _byte_shuffle, "attention_2135": _packed_attention,
    "softcap_ce": _softcap_ce, "asym_softcap": _asym_softcap, "mlp": _leaky_mlp, "cu_seqlens": _cu_seqlens,
    "rope_tables_bf16": _rope_bf16, "caseops": _caseops, "caseops_bytes": _caseops_bytes, "caseops_bad": _caseops_bad,
    **scoring_units.KINDS,
}  # fmt: skip

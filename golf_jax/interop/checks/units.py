"""Single parts against stored vectors: a table from kind to function."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import DocumentsConfig, GolfError, ModelConfig
from golf_jax.data import caseops
from golf_jax.data.loader import document_segments
from golf_jax.data.sidecar import encode_counted
from golf_jax.data.tokenizer import Tokenizer
from golf_jax.evaluation.adapters import adamw
from golf_jax.evaluation.queue import BOS
from golf_jax.evaluation.tilt import hints, tilted
from golf_jax.interop import pgrp
from golf_jax.interop.checks import documents
from golf_jax.interop.checks.evaluation import packed_result
from golf_jax.interop.checks.forward import activations, hash_ids
from golf_jax.interop.checks.quantization import aligned
from golf_jax.interop.checks.schedule import padded_starts, row_starts
from golf_jax.interop.packed import read_packed_codes, unshuffle_bytes
from golf_jax.interop.pgrp import NotInstalled
from golf_jax.interop.reference import Arrays, Case, NotComputed
from golf_jax.kernels.attention.xsa import exclude_self_value
from golf_jax.kernels.cross_entropy import soft_cap, softcap_cross_entropy
from golf_jax.kernels.fake_quant import RowScheme, fake_quant
from golf_jax.model import layers as ops
from golf_jax.model.gpt import attention, mlp
from golf_jax.model.params import leaves
from golf_jax.model.platforms import resolve
from golf_jax.quant import QTensor
from golf_jax.quant.lowrank import pack
from golf_jax.quant.rounding import sorted_rows, torch_quantile
from golf_jax.quant.schemes import SCHEMES, coded_values

Outputs = dict[str, Any]


def check_units(case: Case) -> None:
    kind = case.settings["kind"]
    if kind not in KINDS:
        raise NotComputed(f"units of kind {kind!r} have no counterpart here")
    case.compare({f"out/{name}": x for name, x in KINDS[kind](case, case.under("in/")).items()})


def _tables(c: ModelConfig, length: int, head_dim: int = 0) -> tuple[jax.Array, jax.Array]:
    return ops.rope_tables(length, c.rope_dims or head_dim or c.head_dim, c.rope_base, c.rope_train_len, c.rope_bf16_frequencies)


def _layer(config: ModelConfig, layer: int, given: Arrays, sight: Any = None) -> Outputs:
    """Attention of one layer with weights in the challenge's orientation: `attn_out`, and what its taps see."""
    names = {leaf.tensor.removeprefix("blocks.{i}.attn."): name for name, leaf in leaves(config).items() if leaf.per_layer}
    w = {names[n]: jnp.asarray(x.T if x.ndim == 2 else x) for n, x in given.items() if n in names}
    taps: dict[str, Any] = {}
    v0, embed = (jnp.asarray(given[k]) if k in given else None for k in ("v0", "value_embed"))
    x, tap = jnp.asarray(given["x"]), lambda name, value: taps.__setitem__(f"0/{layer}/{name}", np.asarray(value))
    out, _ = attention(config, layer, w, x, v0, embed, _tables(config, x.shape[1]), None, tap, sight)
    return {k.removeprefix("0/"): v for k, v in activations(taps).items()} | {"attn_out": out}


def _attention(case: Case, given: Arrays) -> Outputs:
    return _layer(resolve(case.model, jax.default_backend()), case.settings["layer"], given)


def _packed_attention(case: Case, given: Arrays) -> Outputs:
    """PR 2135's head: one packed row, with and without segments; every weight is the product of its factors."""
    s, length = case.settings, given["x"].shape[1]
    heads = {"num_heads": s["heads"], "num_kv_heads": s["kv_heads"], "rope_dims": s["rope_dims"], "head_gate_scale": s["gate_scale"]}
    config = replace(case.model, width=given["x"].shape[-1], gate_window=given["attn_gate_w"].shape[-1], **heads)
    config, last = resolve(config, jax.default_backend(), documents=True), config.num_layers - 1
    given = given | {f"{n}.weight": given[f"{n}_a"] @ given[f"{n}_b"] for n in ("c_q", "c_k", "c_v", "proj")}
    starts = np.isin(np.arange(length), given["cu_seqlens"])[None]
    sight = ops.first_visible(jnp.asarray(np.cumsum(starts, axis=1, dtype=np.int32))), None
    return {f"attn_out{what}": _layer(config, last, given, sees)["attn_out"] for what, sees in (("", sight), ("_unsegmented", None))}


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
    tokens[0, given.get("starts", np.zeros(0, int))] = BOS
    starts = row_starts(document_segments(tokens, BOS, limit or length)[0])
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


def _ngram(case: Case, given: Arrays) -> Outputs:
    s = case.settings
    targets = given["tokens"][1:] if "tokens" in given else documents.stream_of(documents.run_of(case)).tokens[1:]
    found = hints(targets, s["order"])
    hint = found.gated(s["threshold"])
    gated = hint >= 0
    ours: Outputs = {"hint": hint, "boost": np.where(gated, np.float32(s["boost"]), 0)}
    ours |= {"best_prob": found.prob, "best_token": np.where(found.prob > 0, found.token, 0)}
    if "nll" in given:
        logp = np.log(np.maximum(given["hint_prob"], np.finfo(np.float32).tiny))
        before, logp_hint, hint_, target = map(jnp.asarray, (given["nll"], logp, hint, targets))
        ours["nll"] = nll = np.asarray(tilted(before, logp_hint, hint_, target, s["boost"]))
        sums = [x.sum(dtype=np.float64) for x in (given["nll"], nll)]
        ours["totals"] = [*sums, gated.sum(), (hint == targets).sum()]
    return ours


def _tilt_distribution(case: Case, given: Arrays) -> Outputs:
    logp, hint = jax.nn.log_softmax(given["logits"]), jnp.asarray(given["hint"])[:, None]
    every = jnp.arange(logp.shape[1])[None]
    return {"nll": tilted(-logp, jnp.take_along_axis(logp, jnp.maximum(hint, 0), 1), hint, every, case.settings["boost"])}


def _lora_adamw(case: Case, given: Arrays) -> Outputs:
    s = case.settings
    ttt = DocumentsConfig(rank=1, lr=s["lr"], beta2=s["beta2"], eps=s["eps"], weight_decay=s["weight_decay"])
    p, v = jnp.asarray(given["p"]), jnp.zeros(given["p"].shape)
    seen: dict[str, list[Any]] = {"p": [], "v": []}
    for step, grad in enumerate(given["grad"]):
        p, v = adamw(ttt, p, grad, v, jnp.int32(step + 1), jnp.float32(s["lr"]))
        seen["p"].append(p)
        seen["v"].append(v)
    return {name: np.stack(x) for name, x in seen.items()}


def _lqer(case: Case, given: Arrays) -> Outputs:
    """Factors and codes, each singular pair with the sign of the stored one."""
    s = case.settings
    a, b = aligned(given["e"], s["rank"], case.own["out/a_float"], case.own["out/b_float"])
    ours: Outputs = {"a_float": a, "b_float": b, "singular": np.sqrt(np.square(a, dtype=np.float64).sum(0))}
    group = s["group"] if s["asymmetric"] else b.size + 1
    for name, q in zip("ab", pack(a, b, group), strict=True):
        ours |= {name: q.codes, f"{name}_scale": np.reshape(q.scale, case.own[f"out/{name}_scale"].shape)}  # pyright: ignore
    return ours


def _quant_extra(case: Case, _: Arrays) -> Outputs:
    """The record's frame: its numbers, its row orders, the same content packed by brotli; low-rank factors with the stored signs."""
    source = case.refs.case("quant/main")
    codes = source.under("codes/")
    ours: Outputs = {f"row_order/{n}": pgrp.row_order(codes[n]) for n in case.under("out/row_order/")}
    if "artifact" in source.own:
        ours["frame"] = pgrp.sizes(source.own["artifact"].tobytes())
    if "out/artifact_brotli" in case.own:
        try:
            found = read_packed_codes(case.own["out/artifact_brotli"].tobytes())
            same = all(np.array_equal(np.asarray(found[n].codes), x) for n, x in codes.items())
            case.add("out/artifact_brotli", not same, False)
        except NotInstalled as e:
            case.refs.not_checked[f"{case.where}/out/artifact_brotli"] = str(e)
            case.added.add("out/artifact_brotli")
    tensors, scales = source.tensors, source.under("scale/")
    for name in case.under("out/lowrank_a_float/"):
        q = QTensor("int8", "float32", codes=codes[name], scale=scales[name])
        theirs = (case.own[f"out/lowrank_{x}_float/{name}"] for x in "ab")
        a, b = aligned(tensors[name] - coded_values(q), case.recipe.quant.lowrank.rank, *theirs)
        ours |= {f"lowrank_a_float/{name}": a, f"lowrank_b_float/{name}": b}
    return ours


def _standard_batches(case: Case, _: Arrays) -> Outputs:
    found = {name: packed_result(case.refs.case(f"eval/{name}")).trace for name in case.settings["cases"]}
    return {name: trace.chunks[:, 0] for name, trace in found.items() if trace is not None}


KINDS: dict[str, Callable[[Case, Arrays], Outputs]] = {
    "rope_tables": lambda case, given: dict(zip(("cos", "sin"), _tables(case.model, case.settings["length"]), strict=True)),
    "rope": lambda case, given: {"y": ops.rope(jnp.asarray(given["x"]), *_tables(case.model, given["x"].shape[1], given["x"].shape[-1]))},
    "xsa": lambda case, given: {"y": exclude_self_value(given["y"], given["v"])},
    "hash_ids": lambda case, given: {k.removeprefix("ids/"): v for k, v in hash_ids(case.model, given["tokens"]).items()},
    "quantile": lambda case, given: {"rows": np.stack([torch_quantile(sorted_rows(given["w"]), q) for q in case.settings["q"]])},
    "caseops_decode": lambda case, given: {"text": np.frombuffer(caseops.decode(_text(given["text"])).encode(), np.uint8)},
    "attention": _attention, "fake_quant": _fake_quant, "byte_shuffle": _byte_shuffle, "attention_2135": _packed_attention,
    "softcap_ce": _softcap_ce, "asym_softcap": _asym_softcap, "mlp": _leaky_mlp, "cu_seqlens": _cu_seqlens,
    "rope_tables_bf16": _rope_bf16, "caseops": _caseops, "caseops_bytes": _caseops_bytes, "caseops_bad": _caseops_bad,
    "ngram_tilt": _ngram, "tilt_distribution": _tilt_distribution, "lora_adamw": _lora_adamw, "lqer": _lqer,
    "quant_extra": _quant_extra, "standard_batches": _standard_batches, "ttt_queue": documents.queue_of_run,
    "doc_queue": documents.doc_queue, "chunk_window": documents.chunk_windows_of, "segments": documents.segment_bounds,
    "ttt_lora": documents.adapters_seen, "ttt_global": documents.global_phase,
    "row_order": lambda case, given: {"order": pgrp.row_order(given["codes"])},
    "gate_int8_row": lambda case, given: dict(zip(("codes", "scale"), SCHEMES["int8_row"].make(given["w"], 1.0, None), strict=True)),
}  # fmt: skip

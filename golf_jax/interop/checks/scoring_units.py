"""Single computations of quantizing and scoring in the `units` section: kind -> what ours gives (see units.py for the network's)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import DocumentsConfig
from golf_jax.evaluation.adapters import adamw
from golf_jax.evaluation.tilt import hints, tilted
from golf_jax.interop import pgrp
from golf_jax.interop.checks import documents
from golf_jax.interop.checks.evaluation import packed_result
from golf_jax.interop.checks.quantization import aligned
from golf_jax.interop.checks.reference import Arrays, Case
from golf_jax.interop.packed import read_packed_codes
from golf_jax.interop.pgrp import NotInstalled
from golf_jax.quant import QTensor
from golf_jax.quant.lowrank import pack
from golf_jax.quant.schemes import SCHEMES, coded_values

Outputs = dict[str, Any]


def _ngram(case: Case, given: Arrays) -> Outputs:
    s = case.settings
    targets = given["tokens"][1:] if "tokens" in given else documents.tokens_of_run(case)[1:]
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
    codes = {n: x for n, x in source.under("codes/", "own").items()}
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
    tensors, scales = source.tensors, source.under("scale/", "own")
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
    "ngram_tilt": _ngram, "tilt_distribution": _tilt_distribution, "lora_adamw": _lora_adamw, "lqer": _lqer,
    "quant_extra": _quant_extra, "standard_batches": _standard_batches, "ttt_queue": documents.queue_of_run,
    "doc_queue": documents.doc_queue, "chunk_window": documents.chunk_windows_of, "segments": documents.segment_bounds,
    "ttt_lora": documents.adapters_seen, "ttt_global": documents.global_phase,
    "row_order": lambda case, given: {"order": pgrp.row_order(given["codes"])},
    "gate_int8_row": lambda case, given: dict(zip(("codes", "scale"), SCHEMES["int8_row"].make(given["w"], 1.0, None), strict=True)),
}  # fmt: skip

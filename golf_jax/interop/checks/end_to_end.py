"""The tail of a reference training run: average, quantize, dequantize, score, adapt. Everything ours, from the first step on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from golf_jax.config import load_recipe
from golf_jax.evaluation import METHODS, Result, Stream
from golf_jax.interop.checks.base import CheckResult, Comparison, Context
from golf_jax.interop.checks.evaluation import ROWS, TTT_ROWS, TTTCase, byte_tables, quick_compilation, setting, ttt_method
from golf_jax.interop.checks.quantization import Tensors, canonical, quant_config
from golf_jax.interop.checks.training import main_run
from golf_jax.interop.packed import canonical_name
from golf_jax.mesh import make_mesh
from golf_jax.model import Model, from_tensors
from golf_jax.quant import dequantize_all, quantize

FILES = {"pr372": ("train", "eval"), "pr638": ("e2e", "train", "eval"), "pr1182": ("train", "eval", "ttt")}
"""What the check reads; the scores lie in the first."""
# bits per byte. PR 372 quantizes in every training step, where one flipped code changes all that follows (INDEX: losses 5e-3).
BPB = {"pr372": 5e-3, "pr638": 1e-4, "pr1182": 1e-4}
CODES = 1e-3
"""Fraction of codes that the float noise of 20 steps may flip."""


@dataclass(frozen=True)
class Stage:
    """One score of the tail."""

    name: str
    weights: str
    """raw, ema or packed."""
    mode: str
    bpb: float
    counts: tuple[float, ...] = ()
    """Tokens and bytes, where stored."""
    stride: int = 0


@quick_compilation()
def check_end_to_end(ctx: Context) -> list[CheckResult]:
    """e2e.npz of PR 638, the last part of train.npz of PRs 372 and 1182."""
    if ctx.recipe not in FILES or not all(map(ctx.has, FILES[ctx.recipe])):
        return []
    stages, z = list(_stages(ctx)), ctx.file(FILES[ctx.recipe][0])
    if not stages:
        return []
    m, run = ctx.model(), main_run(ctx)
    settings = m.settings | z.config()
    raw, ema = canonical(run.final), canonical(run.ours.ema)
    packed = quantize(ema, quant_config(ctx, settings))
    weights = {"raw": raw, "ema": ema, "packed": dequantize_all(packed)}
    c_codes = Comparison("end to end: codes", CODES, "equal")
    for key, want in z.under("w/").items():
        if key.endswith(".q"):
            c_codes.add(key, packed[canonical_name(key.removesuffix(".q"))].codes, want)
    c_bpb, c_counts = Comparison("end to end: bpb", BPB[ctx.recipe], "abs"), Comparison("end to end: counts", 0.0, "equal")
    c_norm = Comparison("end to end: gradient norms of TTT", 1e-3, "rel")
    for stage in stages:
        result = _score(ctx, settings, weights[stage.weights], stage)
        c_bpb.add(stage.name, result.score.bpb, stage.bpb)
        if stage.counts:
            c_counts.add(stage.name, [result.score.tokens, result.score.bytes], stage.counts)
        if stage.mode == "ttt" and result.trace is not None:
            c_norm.add(stage.name, result.trace.grad_norm, z["e2e/ttt_preclip_norm"])
    return [c.result() for c in (c_codes, c_bpb, c_counts, c_norm) if c.compared]


def _stages(ctx: Context) -> Iterator[Stage]:
    """The scores a directory holds, in the order of the run."""
    if ctx.recipe == "pr372":
        z = ctx.file("train")
        stride = int(setting(ctx.model().settings | ctx.file("eval").config(), "eval_stride", "sliding_stride"))
        for key, weights, mode in (("final_standard", "raw", "standard"), ("final_sliding_ema_quant", "packed", "sliding")):
            if key in z:
                _, bpb, _, tokens, count = (float(x) for x in z[key])
                yield Stage(key, weights, mode, bpb, (tokens, count), stride)
    elif ctx.recipe == "pr638":
        names = (("raw", "standard"), ("packed", "standard"), ("packed", "sliding"), ("packed", "sliding"))
        for (weights, mode), (nll, tokens, count, last) in zip(names, ctx.file("e2e")["evals_sums"], strict=True):
            bpb = float(nll / count / np.log(2))
            yield Stage(f"{weights} {mode} {last:.0f}", weights, mode, bpb, (tokens, count), int(last))
    elif "e2e/evals" in ctx.file("train"):
        stride = int(setting(ctx.file("train").config(), "eval_stride"))
        standard, strides = iter(("raw", "ema", "packed")), iter((stride, 64))
        for function, _, bpb in json.loads(str(ctx.file("train")["e2e/evals"])):
            if function == "eval_val":
                weights = next(standard)
                yield Stage(f"{weights} standard", weights, "standard", bpb)
            elif function == "eval_val_sliding":
                step = next(strides)
                yield Stage(f"packed sliding {step}", "packed", "sliding", bpb, (), step)
            else:
                yield Stage("packed ttt", "packed", "ttt", bpb, (), stride)


def _score(ctx: Context, settings: dict[str, Any], tensors: Tensors, stage: Stage) -> Result:
    config, z = ctx.model().config, ctx.file("eval")
    params = from_tensors(config, {n: np.asarray(x, np.float32) for n, x in tensors.items()})
    # PR 1182's run was scored on as many tokens as its ttt.npz holds.
    tokens = (ctx.file("ttt") if ctx.recipe == "pr1182" else z)["val_tokens"].astype(np.uint16)
    seq_len = int(setting(settings, "eval_seq_len", "seq_len", "train_seq_len"))
    name, method = stage.mode, replace(load_recipe(ctx.recipe).eval.sliding, stride=stage.stride)
    if stage.mode == "ttt":
        name, method = ttt_method(ctx, settings, TTTCase("e2e", fake_quant=True))
    stream = Stream.of(tokens, byte_tables(z), seq_len, TTT_ROWS if stage.mode == "ttt" else ROWS)
    return METHODS[name](Model(config, params), stream, make_mesh(ctx.devices), method)

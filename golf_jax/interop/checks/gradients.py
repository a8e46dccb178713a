"""Gradients of the mean loss with respect to every parameter, under the PR's names."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import ModelConfig
from golf_jax.interop.checks.base import CheckResult, Comparison, Context, Measure, Model, Reference, compiler_options
from golf_jax.interop.checks.forward import LOSS
from golf_jax.interop.torch_names import to_torch
from golf_jax.model.fake_quant import fake_quantize
from golf_jax.model.gpt import nll

# Tolerances of the INDEX files; the project's own bar is 1e-3 relative L2 for all.
GRADS: dict[str, tuple[float, Measure]] = {
    "pr372": (1e-4, "of max"),
    "pr562": (1e-4, "rel L2"),
    "pr638": (1e-4, "rel L2"),
    "pr1182": (1e-3, "rel L2"),
    "pr2005": (1e-3, "rel L2"),
}


def gradients(ctx: Context, m: Model, z: Reference, *, fake_quant: bool, looping: bool = True) -> tuple[float, dict[str, np.ndarray]]:
    """(mean loss, d loss / d parameter by PR name) on z's tokens; `fake_quant`: straight through the quantized weights."""
    x, y = (z[k].astype(np.int32) for k in ("tokens", "targets"))
    plain = replace(m.config, fake_quant=replace(m.config.fake_quant, in_eval=False))

    def mean_loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(nll(plain, params, x, y, looping=looping, fake_quant=1.0 if fake_quant else None))

    key = ("gradients", plain, x.shape, fake_quant, looping)
    compiled = ctx.once(key, lambda: jax.jit(jax.value_and_grad(mean_loss), compiler_options=compiler_options()))
    loss, grads = compiled({k: jnp.asarray(v) for k, v in m.params.items()}, x, y)
    return float(loss), to_torch(ctx.recipe, m.config, grads)


def slice_of(tensors: dict[str, np.ndarray], name: str) -> np.ndarray | None:
    """A tensor by a PR's name, also `bank[i]` and `table[:n]`."""
    if name in tensors:
        return tensors[name]
    base, bracket, index = name.partition("[")
    if not bracket or base not in tensors:
        return None
    index = index.rstrip("]")
    return tensors[base][: int(index[1:])] if index.startswith(":") else tensors[base][int(index)]


def check_gradients(ctx: Context) -> list[CheckResult]:
    """grads.npz, grads_noqat.npz, grads_noloop.npz (or the portable file's gradients)."""
    if ctx.portable:
        return _portable(ctx)
    results = []
    for name in ("grads", "grads_noqat", "grads_noloop"):
        if ctx.has(name):
            z, m = ctx.file(name), ctx.model()
            source = z if "tokens" in z else ctx.file("model")
            with_quant = ctx.recipe == "pr372" and name != "grads_noqat"
            loss, ours = gradients(ctx, m, source, fake_quant=with_quant, looping=name != "grads_noloop")
            results += _compare(ctx, name, z, loss, ours)
            if "qat/loss" in z:
                loss, ours = gradients(ctx, m, source, fake_quant=True)
                results += _compare(ctx, f"{name} with fake quantization", z, loss, ours, prefix="qat/")
                results.append(_quantized_weights(ctx, m.config, m.params, z))
    if ctx.has("variants") and any(k.startswith("qat_train/grad/") for k in ctx.file("variants")):
        results += _variant_gradients(ctx)
    return results


def _compare(ctx: Context, name: str, z: Reference, loss: float, ours: dict[str, np.ndarray], prefix: str = "") -> list[CheckResult]:
    tolerance, measure = GRADS[ctx.recipe]
    c_loss = Comparison(f"{name}: loss", *LOSS[ctx.recipe])
    c_grad, c_norm = Comparison(name, tolerance, measure), Comparison(f"{name}: norms", 1e-3, "rel")
    if f"{prefix}loss" in z:
        c_loss.add("loss", loss, z[f"{prefix}loss"])
    for key, want in z.under(f"{prefix}grad/").items():
        _add(c_grad, key, slice_of(ours, key), want)
    for key, want in z.under(f"{prefix}grad_rows/").items():
        _add(c_grad, f"{key} (rows)", ours[key][z["tok_emb_rows"]], want)
    for key, want in (z.under("gradnorm/") if not prefix else {}).items():
        _add(c_norm, key, np.linalg.norm(ours[key].astype(np.float64)), want)
    total = z.first("grad_norm_total", "total_norm", "grad_total_norm") if not prefix else None
    if total is not None:
        c_norm.add("total", _total(ours), total)
    return [c.result() for c in (c_loss, c_grad, c_norm) if c.compared]


def _add(c: Comparison, key: str, ours: np.ndarray | np.floating | None, want: np.ndarray) -> None:
    if ours is None:
        c.fail(f"{key}: no such parameter here")
    else:
        c.add(key, ours, want)


def _total(tensors: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in tensors.values())))


def _quantized_weights(ctx: Context, config: ModelConfig, params: dict, z: Reference) -> CheckResult:
    c = Comparison("fake-quantized weights", 0.0, "equal")
    quantized = jax.jit(lambda p: fake_quantize(config, p, 1.0))(params)
    ours = to_torch(ctx.recipe, config, quantized)
    for key, want in z.under("qat/weight/").items():
        _add(c, key, slice_of(ours, key), want)
    return c.result()


def _variant_gradients(ctx: Context) -> list[CheckResult]:
    """PR 562: fake quantization in a training forward of the first row."""
    z, m, source = ctx.file("variants"), ctx.model(), ctx.file("model")
    row = _Rows({key: source[key][:1] for key in ("tokens", "targets")})
    _, ours = gradients(ctx, m, row, fake_quant=True)  # pyright: ignore[reportArgumentType]
    c = Comparison("variants: gradients with fake quantization", *GRADS[ctx.recipe])
    for key, want in z.under("qat_train/grad/").items():
        _add(c, key, slice_of(ours, key), want)
    return [c.result()]


class _Rows(dict):
    """Tokens and targets that are not a file."""


def _portable(ctx: Context) -> list[CheckResult]:
    z, m = ctx.file("portable"), ctx.model("portable")
    loss, ours = gradients(ctx, m, z, fake_quant=ctx.recipe == "pr372")
    c_loss, c_grad, c_norm = (
        Comparison("gradients: loss", 1e-5, "abs"),
        Comparison("gradients", 1e-3, "rel L2"),
        Comparison("gradients: norms", 1e-3, "rel"),
    )
    c_loss.add("loss", loss, z["loss"])
    for key, want in z.under("grad/").items():
        _add(c_grad, key, slice_of(ours, key), want)
    for key, want in z.under("grad_norm/").items():
        _add(c_norm, key, np.linalg.norm(ours[key].astype(np.float64)), want)
    if "grad_norm_total" in z:
        c_norm.add("total", _total(ours), z["grad_norm_total"])
    if "grad_norm_noloop_json" in z:
        _, flat = gradients(ctx, m, z, fake_quant=False, looping=False)
        for key, want in json.loads(str(z["grad_norm_noloop_json"])).items():
            c_norm.add(f"{key} (no looping)", np.linalg.norm(flat[key].astype(np.float64)), np.float64(want))
    return [c.result() for c in (c_loss, c_grad, c_norm)]

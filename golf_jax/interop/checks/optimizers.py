"""Newton-Schulz, and trajectories of Muon, AdamW and SGD over a few steps with stored gradients."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import GolfError, GroupConfig, OptimConfig
from golf_jax.evaluation.adapter import initial_state, update
from golf_jax.evaluation.score_first import momentum_rule
from golf_jax.interop.reference import Arrays, Case
from golf_jax.optim import StackLayout, make_optimizer, newton_schulz
from golf_jax.optim.optimizer import group_scalars


def check_newton_schulz(case: Case) -> None:
    group, x = case.matrices, jnp.asarray(case.seen["input"])
    ways: dict[str, Any] = {"coefficients": group.newton_schulz_coefficients, "square_first": group.bf16_momentum}

    def run(dtype: Any) -> np.ndarray:
        return np.asarray(newton_schulz(x, group.newton_schulz_steps, dtype, **ways), np.float32)

    case.compare({name: run(dtype) for name, dtype in (("fp32", jnp.float32), ("bf16", jnp.bfloat16)) if name in case.own})


def check_optimizer(case: Case) -> None:
    kind = case.settings["kind"]
    if kind not in ("muon", "adamw", "sgd"):
        raise GolfError(f"{case.refs.path}: {case.where}: kind {kind!r} is not one of muon, adamw, sgd")
    case.compare(_sgd(case) if kind == "sgd" else _trajectory(case))


def _grads(case: Case) -> list[Arrays]:
    """By step; settings may go on beyond the steps that are stored."""
    steps = {int(item.split("/")[1]) for item in case.seen if item.startswith("grad/")}
    return [case.under(f"grad/{k}/") for k in range(1, max(steps, default=len(case.settings["lr"])) + 1)]


def _trajectory(case: Case) -> dict[str, Any]:
    """Parameters and state after every step, by the format's names, from the project's own optimizer."""
    s, base = case.settings, case.recipe.optim
    muon, low, lr = s["kind"] == "muon", s.get("bf16", []), s["lr"]
    if muon:
        group = replace(case.matrices, bf16_momentum="momentum" in low)
    else:
        group = next((g for g in base.groups if g.kind == "adamw"), GroupConfig("all", (), "adamw"))
        group = replace(group, betas=tuple(s.get("betas", group.betas)), eps=s.get("eps", group.eps))
    group = replace(group, name="all", roles=("all",), weight_decay=s.get("weight_decay", 0.0))
    config = OptimConfig(groups=(group,), decay_last=base.decay_last)
    stored = jnp.bfloat16 if "params" in low else jnp.float32
    turn = (lambda x: np.swapaxes(np.asarray(x), -1, -2)) if muon else np.asarray
    start = case.under("start/")
    params = {name: jnp.asarray(turn(x)).astype(stored) for name, x in start.items()}
    grads = _grads(case)
    live = {name: jnp.float32(0) for name in params if not any(name in g for g in grads)}  # never gets a gradient: must not move
    opt = make_optimizer(config, params, dict.fromkeys(params, "all"), numerics="as_run" if low else "fp32", live=live)
    state, step = opt.init(params), jax.jit(opt.update)
    momenta = {n: jnp.dtype(jnp.bfloat16 if group.bf16_momentum else p.dtype) for n, p in params.items()}
    layout = StackLayout.of({n: p.shape for n, p in params.items()}, momenta) if muon else None
    ours: dict[str, Any] = {}
    norms = []
    for i, given in enumerate(grads):
        ready = {n: jnp.asarray(turn(given[n])).astype(stored) if n in given else jnp.zeros_like(params[n]) for n in params}
        scalars = group_scalars(config, 0)["all"]._replace(lr=np.float32(lr[i]))
        if muon:
            scalars = scalars._replace(rule=np.float32(s["momentum"][i]))
        limit = np.float32(s.get("clip_norm", np.inf))
        updates, state, norm = step(ready, state, params, lr_factor=np.float32(1), groups={"all": scalars}, clip_norm=limit)
        # One rounding when storing, as the fused kernels and optax.apply_updates have it.
        params = {n: (p.astype(jnp.float32) + updates[n]).astype(stored) for n, p in params.items()}
        norms.append(float(norm))
        kept = {"momentum": layout.unpack(state["all"])} if layout else {m: getattr(state["all"], m) for m in ("mu", "nu")}
        ours |= {
            f"{what}/{i + 1}/{n}": turn(np.asarray(x, np.float32))
            for what, tree in ({"after": params} | kept).items()
            for n, x in tree.items()
        }
    return ours | {"grad_norm": norms}


def _sgd(case: Case) -> dict[str, Any]:
    """Test-time training's: clip, then SGD with momentum."""
    rule = momentum_rule(case.recipe.eval.score_first)
    state = initial_state(rule, {n: jnp.asarray(x) for n, x in case.under("start/").items()})
    ours: dict[str, Any] = {}
    norms = []
    for i, grads in enumerate(_grads(case), 1):
        state, norm = update(rule, state, {n: jnp.asarray(g) for n, g in grads.items()}, case.settings["lr"][i - 1])
        norms.append(float(norm))
        ours |= {f"after/{i}/{n}": x for n, x in state.params.items()}
    return ours | {"grad_norm": norms}

"""Newton-Schulz, and trajectories of Muon and AdamW over a few steps with stored gradients (muon.npz)."""

import json
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import GroupConfig, OptimConfig, load_recipe
from golf_jax.evaluation.adapter import initial_state, update
from golf_jax.evaluation.score_first import momentum_rule
from golf_jax.interop.checks.base import CheckResult, Comparison, Context, Measure, Reference
from golf_jax.interop.hparams import hyperparameters
from golf_jax.optim import StackLayout, make_optimizer, newton_schulz
from golf_jax.optim.optimizer import group_scalars

Arrays = dict[str, np.ndarray]

# Tolerances of the INDEX files: Newton-Schulz in float32, in bfloat16; trajectories in float32; trajectories with bfloat16 in them.
NS32: dict[str, tuple[float, Measure]] = {
    "pr372": (1e-4, "of max"), "pr562": (2e-5, "abs"), "pr638": (1e-5, "abs"), "pr1182": (1e-5, "rel L2"), "pr2005": (1e-4, "of max"),
}  # fmt: skip
NS16: dict[str, tuple[float, Measure]] = {
    "pr372": (0.1, "of max"), "pr562": (2e-2, "abs"), "pr638": (0.03, "abs"), "pr1182": (2e-2, "rel L2"), "pr2005": (5e-2, "rel L2"),
}  # fmt: skip
STEPS: dict[str, tuple[float, Measure]] = {
    "pr372": (1e-5, "of max"), "pr562": (1e-6, "abs"), "pr638": (1e-6, "abs"), "pr1182": (1e-5, "rel L2"), "pr2005": (1e-5, "of max"),
}  # fmt: skip
BF16_ULP: tuple[float, Measure] = (2.0**-7, "rel")
# Nearly singular inputs: 1e-4 in float32, and no comparison in bfloat16, where implementations differ by more than the values.
SINGULAR = {"pr562": ("lowrank",), "pr638": ("square",), "pr1182": ("lowrank",)}


@dataclass
class Trajectory:
    """Stored steps of one optimizer on named tensors in the PR's orientation (out, in)."""

    name: str
    kind: str
    start: Arrays
    grads: list[Arrays]
    after: list[Arrays]
    lr: list[float]
    momentum: list[float] = field(default_factory=list)
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    buffers: dict[int, Arrays] = field(default_factory=dict)
    """Muon's momentum after step i."""
    moments: dict[int, tuple[Arrays, Arrays]] = field(default_factory=dict)
    """Adam's moments after step i."""
    bf16: str = ""
    """"": float32; "ns": Newton-Schulz; "ns+momentum"; "storage": parameter, gradient and moments."""


def check_muon(ctx: Context) -> list[CheckResult]:
    """muon.npz, and PR 2005's AdamW on a bfloat16 table (units.npz)."""
    results = []
    if ctx.has("muon"):
        z = ctx.file("muon")
        results += _newton_schulz(ctx, z)
        trajectories = _READERS[ctx.recipe](z)
    else:
        trajectories = []
    if ctx.has("units") and "bf16adamw/param0" in ctx.file("units"):
        trajectories.append(_bf16_table_2005(ctx.file("units")))
    return results + _compare(ctx, trajectories) + _sgd_1182(ctx)


def _newton_schulz(ctx: Context, z: Reference) -> list[CheckResult]:
    c32, c16 = Comparison("Newton-Schulz float32", *NS32[ctx.recipe]), Comparison("Newton-Schulz bfloat16", *NS16[ctx.recipe])
    c_singular = Comparison("Newton-Schulz float32, nearly singular", 1e-4, NS32[ctx.recipe][1])
    square_first = _muon_group(load_recipe(ctx.recipe).optim).bf16_momentum
    cases = {key.split("/")[1]: None for key in z if key.startswith("ns/")}
    for case in cases:
        source = z.first(f"ns/{case}/in", f"ns/{case}/input")
        if source is None:  # PR 638's zero matrix
            source = np.zeros_like(z[f"ns/{case}/out_fp32"])
        inputs = {"": source} | ({"_of_row_normalised": z[f"ns/{case}/row_normalised"]} if f"ns/{case}/row_normalised" in z else {})
        for suffix, x in inputs.items():
            singular = case in SINGULAR.get(ctx.recipe, ())
            for dtype, c in ((jnp.float32, c_singular if singular else c32), (jnp.bfloat16, c16)):
                key = f"ns/{case}/out_{'fp32' if dtype == jnp.float32 else 'bf16'}{suffix}"
                if key in z and not (singular and dtype == jnp.bfloat16):
                    ours = newton_schulz(jnp.asarray(x), 5, dtype, square_first=square_first)
                    c.add(key, np.asarray(ours, np.float32), z[key])
    return [c.result() for c in (c32, c_singular, c16) if c.compared]


def _compare(ctx: Context, trajectories: list[Trajectory]) -> list[CheckResult]:
    comparisons: dict[str, Comparison] = {}
    bar: tuple[float, Measure]
    for t in trajectories:
        if not t.bf16:
            label, bar = f"{t.kind} steps", STEPS[ctx.recipe]
        elif t.bf16 == "storage":
            label, bar = f"{t.kind} steps, bfloat16 tables", BF16_ULP
        else:
            label = f"{t.kind} steps, bfloat16 Newton-Schulz"
            bar = (2e-2, "rel L2")
        _run(ctx, t, comparisons.setdefault(label, Comparison(label, *bar)))
    return [c.result() for c in comparisons.values()]


def _run(ctx: Context, t: Trajectory, c: Comparison) -> None:
    """Repeat the steps with the project's optimizer and compare parameters and state after each."""
    base = load_recipe(ctx.recipe).optim
    role = "matrix" if t.kind == "muon" else "vector"
    if t.kind == "muon":
        muon = _muon_group(base)
        low = muon.bf16_momentum and t.bf16 == "ns+momentum"
        group = GroupConfig("all", (role,), "muon", t.lr[0], t.weight_decay, row_normalize=muon.row_normalize, bf16_momentum=low)
    else:
        group = GroupConfig("all", (role,), "adamw", t.lr[0], t.weight_decay, betas=t.betas)
    config = OptimConfig(groups=(group,), decay_last=base.decay_last)
    stored = jnp.bfloat16 if t.bf16 == "storage" else jnp.float32
    to_ours = (lambda x: jnp.asarray(np.swapaxes(x, -1, -2))) if t.kind == "muon" else jnp.asarray
    to_theirs = (lambda x: np.swapaxes(np.asarray(x, np.float32), -1, -2)) if t.kind == "muon" else (lambda x: np.asarray(x, np.float32))
    params = {name: to_ours(x).astype(stored) for name, x in t.start.items()}
    live = {name: jnp.float32(0) for name in params if not any(name in g for g in t.grads)}  # never gets a gradient: must not move
    opt = make_optimizer(config, params, dict.fromkeys(params, role), numerics="as_run" if t.bf16 else "fp32", live=live)
    state, step = opt.init(params), jax.jit(opt.update)
    for i, grads in enumerate(t.grads):
        ours = {n: to_ours(grads[n]).astype(stored) if n in grads else jnp.zeros_like(params[n]) for n in params}
        scalars = group_scalars(config, 0)
        if t.kind == "muon":
            scalars["all"] = scalars["all"]._replace(rule=np.float32(t.momentum[i]))
        traced = dict(lr_factor=np.float32(t.lr[i] / t.lr[0]), groups=scalars, clip_norm=np.float32(np.inf))
        updates, state, _ = step(ours, state, params, **traced)
        # One rounding when storing, as the fused kernels and optax.apply_updates have it.
        params = {n: (p.astype(jnp.float32) + updates[n]).astype(stored) for n, p in params.items()}
        for name, want in t.after[i].items():
            c.add(f"{t.name}/{name} step {i + 1}", to_theirs(params[name]), want)
        for name, want in t.buffers.get(i, {}).items():
            c.add(f"{t.name}/{name} momentum {i + 1}", to_theirs(_momentum(state, params, group)[name]), want)
        for which, moment in zip(("mu", "nu"), t.moments.get(i, ()), strict=False):
            for name, want in moment.items():
                c.add(f"{t.name}/{name} {which} {i + 1}", _adam(state, which)[name], want)


def _sgd_1182(ctx: Context) -> list[CheckResult]:
    """PR 1182's optimizer of test-time training: clip, then SGD with momentum."""
    if not ctx.has("muon") or "sgd/p1" not in ctx.file("muon"):
        return []
    z, rule = ctx.file("muon"), momentum_rule(load_recipe("pr1182").eval.score_first)
    c = Comparison("sgd steps", *STEPS["pr1182"])
    state = initial_state(rule, {"w": jnp.asarray(z["adamw/proj/p0"])})
    for i, factor in enumerate((1.0, 0.7, 0.3), 1):
        grads = {"w": jnp.asarray(z[f"adamw/proj/g{i}"] * np.float32(z["sgd/grad_factor"]))}
        state, norm = update(rule, state, grads, 0.002 * factor)
        c.add(f"step {i}", state.params["w"], z[f"sgd/p{i}"])
        c.add(f"norm {i}", norm, z[f"sgd/norm{i}"])
    return [c.result()]


def _muon_group(optim: OptimConfig) -> GroupConfig:
    return next(g for g in optim.groups if g.kind == "muon")


def _momentum(state: Any, params: dict, group: GroupConfig) -> dict:
    """Muon's momentum by tensor."""
    dtypes = {n: jnp.dtype(jnp.bfloat16 if group.bf16_momentum else p.dtype) for n, p in params.items()}
    return StackLayout.of({n: p.shape for n, p in params.items()}, dtypes).unpack(state["all"])


def _adam(state: Any, which: str) -> dict:
    return {name: np.asarray(x, np.float32) for name, x in getattr(state["all"], which).items()}


def _by_step(z: Reference, pattern: str, names: list[str], steps: int) -> list[Arrays]:
    """Per step the tensors stored under pattern.format(i=1.., name=...), where they are."""
    keys = [{name: pattern.format(i=i, name=name) for name in names} for i in range(1, steps + 1)]
    return [{name: z[key] for name, key in row.items() if key in z} for row in keys]


def _names(z: Reference, prefix: str, suffix: str = "") -> list[str]:
    return [k[len(prefix) : len(k) - len(suffix)] for k in z if k.startswith(prefix) and k.endswith(suffix)]


def _read_372(z: Reference) -> list[Trajectory]:
    h = z.config()
    muon_lr, out = [h["lr"] * f for f in h["lr_mult"]], []
    cases = _names(z, "muon/", "/param_before")
    start = {n: z[f"muon/{n}/param_before"] for n in cases}
    grads = _by_step(z, "muon/{name}/grad_step{i}", cases, len(muon_lr))
    for kind in ("fp32", "bf16"):
        if any(k.startswith(f"muon_{kind}/") for k in z):
            after = _by_step(z, f"muon_{kind}/{{name}}/param_after_step{{i}}", cases, len(muon_lr))
            last = {n: z[k] for n in cases if (k := f"muon_{kind}/{n}/momentum_buffer_final") in z}
            t = Trajectory(f"muon_{kind}", "muon", start, grads, after, muon_lr, h["momentum"], h["weight_decay"])
            t.buffers, t.bf16 = {len(muon_lr) - 1: last}, "ns" if kind == "bf16" else ""
            out.append(t)
    for family in ("adam", "adam_bf16"):
        for n in _names(z, f"{family}/", "/param_before"):
            base = float(z[f"adam/{n}/lr"])
            steps = len(muon_lr)
            t = Trajectory(
                f"{family}/{n}",
                "adam",
                {n: z[f"{family}/{n}/param_before"]},
                _by_step(z, f"{family}/{{name}}/grad_step{{i}}", [n], steps),
                _by_step(z, f"{family}/{{name}}/param_after_step{{i}}", [n], steps),
                [base * f for f in h["lr_mult"]],
                betas=tuple(h["betas"]),
            )
            if family == "adam_bf16":
                t.bf16 = "storage"
                moments = (_by_step(z, f"{family}/{{name}}/{m}_after_step{{i}}", [n], steps) for m in ("exp_avg", "exp_avg_sq"))
                t.moments = dict(enumerate(zip(*moments, strict=True)))
            out.append(t)
    return out


def _read_562(z: Reference) -> list[Trajectory]:
    meta, lrs = json.loads(str(z["meta"])), [float(x) for x in z["muon/lr"]]
    names = _names(z, "muon/p0/")
    muon = Trajectory(
        "muon",
        "muon",
        z.under("muon/p0/"),
        _by_step(z, "muon/g{i}/{name}", names, len(lrs)),
        _by_step(z, "muon/p{i}/{name}", names, len(lrs)),
        lrs,
        [float(x) for x in z["muon/momentum"]],
        float(z["muon/wd"]),
    )
    muon.buffers = dict(enumerate(_by_step(z, "muon/buf{i}/{name}", names, len(lrs))))
    out = [muon]
    for group in ("adamw_tok", "adamw_scalar", "adamw_ttt"):
        for name in _names(z, f"{group}/p0/"):
            m, factors = meta[group], [float(x) for x in z[f"{group}/lr_mul"]]
            kind = next((k for k in m.get("mult", {}) if f".{k}." in name), "rest")
            base = m["lr"] * m.get("mult", {}).get(kind, 1.0)
            out.append(
                Trajectory(
                    group,
                    "adamw",
                    {name: z[f"{group}/p0/{name}"]},
                    _by_step(z, f"{group}/g{{i}}/{{name}}", [name], len(factors)),
                    _by_step(z, f"{group}/p{{i}}/{{name}}", [name], len(factors)),
                    [base * f for f in factors],
                    weight_decay=m["wd"],
                    betas=tuple(m["betas"]),
                )
            )
    return out


def _read_638(z: Reference) -> list[Trajectory]:
    h, out = z.config(), []
    cases, lrs = _names(z, "muon/", "/p0"), h["muon_lr_per_step"]
    muon = Trajectory(
        "muon",
        "muon",
        {n: z[f"muon/{n}/p0"] for n in cases},
        _by_step(z, "muon/{name}/g{i}", cases, len(lrs)),
        _by_step(z, "muon/{name}/p{i}", cases, len(lrs)),
        lrs,
        h["momentum_per_step"],
        h["muon_wd"],
    )
    muon.buffers = dict(enumerate(_by_step(z, "muon/{name}/buf{i}", cases, len(lrs))))
    out.append(muon)
    for group, base in (("adamw_tok", "tok"), ("adamw_scalar", "scalar"), ("adamw_tok_bf16", "tok")):
        names = _names(z, f"{group}/", "/p0")
        lrs = [h[f"adam_{base}_lr"] * f for f in h["adam_lr_factor_per_step"]]
        t = Trajectory(
            group,
            "adamw",
            {n: z[f"{group}/{n}/p0"] for n in names},
            _by_step(z, f"{group}/{{name}}/g{{i}}", names, len(lrs)),
            _by_step(z, f"{group}/{{name}}/p{{i}}", names, len(lrs)),
            lrs,
            weight_decay=h["adam_wd"],
            betas=tuple(h["adam_betas"]),
            bf16="storage" if group.endswith("bf16") else "",
        )
        out += [t] if names else []
    return out


def _read_1182(z: Reference) -> list[Trajectory]:
    lrs, out = [float(x) for x in z["muon/lr"]], []
    names = _names(z, "muon/", "/p0")
    for kind in ("fp32", "bf16"):
        t = Trajectory(
            f"muon_{kind}",
            "muon",
            {n: z[f"muon/{n}/p0"] for n in names},
            _by_step(z, "muon/{name}/g{i}", names, len(lrs)),
            _by_step(z, f"muon/{{name}}/p{{i}}_{kind}", names, len(lrs)),
            lrs,
            [float(x) for x in z["muon/momentum"]],
            float(z["muon/weight_decay"]),
            bf16="ns+momentum" if kind == "bf16" else "",
        )
        last = {n: z[k] for n in names if (k := f"muon/{n}/buf{len(lrs)}_{kind}") in z}
        t.buffers = {len(lrs) - 1: last}
        out.append(t)
    base, decay = json.loads(str(z["adamw/base_lr"])), hyperparameters("pr1182", {})["adam_wd"]
    for kind in ("fp32", "bf16"):
        for n in _names(z, "adamw/", "/p0"):
            factors = [float(x) for x in z["adamw/lr_scale"]]
            out.append(
                Trajectory(
                    f"adamw_{kind}",
                    "adamw",
                    {n: z[f"adamw/{n}/p0"]},
                    _by_step(z, "adamw/{name}/g{i}", [n], len(factors)),
                    _by_step(z, f"adamw/{{name}}/p{{i}}_{kind}", [n], len(factors)),
                    [base[n] * f for f in factors],
                    weight_decay=decay,
                    bf16="storage" if kind == "bf16" else "",
                )
            )
    return out


def _read_2005(z: Reference) -> list[Trajectory]:
    groups, schedule = json.loads(str(z["traj/groups"])), json.loads(str(z["traj/schedule"]))
    out, steps = [], len(schedule)
    for group in dict.fromkeys(groups.values()):
        hyper = json.loads(str(z[f"hyper/{group}"]))
        names = [n for n, g in groups.items() if g == group and f"traj/param0/{n}" in z]
        t = Trajectory(
            group,
            "muon" if group == "muon" else "adamw",
            {n: z[f"traj/param0/{n}"] for n in names},
            _by_step(z, "traj/grad{i}/{name}", names, steps),
            _by_step(z, "traj/param{i}/{name}", names, steps),
            [hyper["base_lr"] * s["lr_scale"] for s in schedule],
            [s["momentum"] for s in schedule],
            hyper["weight_decay"],
            buffers={steps - 1: z.under(f"traj/momentum_buffer{steps}/") if group == "muon" else {}},
        )
        out.append(t)
        low = z.under(f"traj_bf16/param{steps}/")
        if group == "muon" and low:
            after = [{} for _ in range(steps - 1)] + [low]
            out.append(Trajectory("muon_bf16", "muon", t.start, t.grads, after, t.lr, t.momentum, t.weight_decay, bf16="ns"))
    return out


def _bf16_table_2005(z: Reference) -> Trajectory:
    h, lrs = hyperparameters("pr2005", z.config()), [float(x) for x in z["bf16adamw/lr"]]
    rows = [{"table": z[f"bf16adamw/grad{i}"]} for i in range(1, len(lrs) + 1)]
    after = [{"table": z[f"bf16adamw/param{i}"]} for i in range(1, len(lrs) + 1)]
    moments = {i: ({"table": z[f"bf16adamw/m{i + 1}"]}, {"table": z[f"bf16adamw/v{i + 1}"]}) for i in range(len(lrs))}
    start = {"table": z["bf16adamw/param0"]}
    return Trajectory("bf16adamw", "adamw", start, rows, after, lrs, weight_decay=h["embed_wd"], moments=moments, bf16="storage")


_READERS = {"pr372": _read_372, "pr562": _read_562, "pr638": _read_638, "pr1182": _read_1182, "pr2005": _read_2005}

"""Fresh full-size models: parameter counts, shapes, storage, optimizer groups, and the statistics of the initialisation (init.npz)."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import jax
import ml_dtypes
import numpy as np

from golf_jax.config import Recipe, load_recipe
from golf_jax.interop.checks.base import CheckResult, Comparison, Context, Reference
from golf_jax.interop.checks.gradients import slice_of
from golf_jax.interop.torch_names import pr_names, to_torch
from golf_jax.model.params import count, init_params, leaves, storage_dtypes, tensor_names
from golf_jax.optim.optimizer import route

SIGMAS = 6.0  # how far a statistic of independent draws may be from the reference's, in standard errors


@dataclass
class Facts:
    """What one init.npz says, by the PR's tensor names."""

    total: int
    shapes: dict[str, tuple[int, ...]]
    stats: dict[str, np.ndarray]
    """mean, population std, min, max"""
    rounded: bool
    """Whether the statistics are of values rounded to bfloat16 (what `numerics = "as_run"` starts from)."""
    singular: dict[str, tuple[float, float]] = field(default_factory=dict)
    dtype: dict[str, str] = field(default_factory=dict)
    group: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    """muon, adamw or frozen; learning rate; weight decay"""


def check_init(ctx: Context) -> list[CheckResult]:
    """init.npz against the shipped recipe, which is the full-size run."""
    facts = _READERS[ctx.recipe](ctx.file("init"))
    recipe = load_recipe(ctx.recipe)
    c_count = Comparison("init: parameter count", 0.0, "equal")
    c_count.add("total", count(recipe.model), facts.total)
    params = init_params(recipe.model, jax.random.key(recipe.seed))
    ours = {n: np.asarray(x, np.float32) for n, x in to_torch(ctx.recipe, recipe.model, params).items()}
    c_shape = Comparison("init: shapes", 0.0, "equal")
    for name in {*facts.shapes, *ours}:
        if name in ours and name in facts.shapes:
            c_shape.add(name, ours[name].shape, facts.shapes[name])
        else:
            c_shape.fail(f"{name}: only in {'ours' if name in ours else 'the reference'}")
    results = [c_count, c_shape, *_statistics(ours, facts), *_singular(ours, facts), *_routing(ctx, recipe, facts)]
    return [c.result() for c in results if c.compared]


def _statistics(ours: dict[str, np.ndarray], facts: Facts) -> list[Comparison]:
    c_const = Comparison("init: constants", 1e-7, "abs")
    c_mean = Comparison("init: means (standard errors)", SIGMAS, "abs")
    c_std = Comparison("init: deviations (standard errors)", SIGMAS, "abs")
    c_range = Comparison("init: extremes", 0.5, "rel")
    for name, (mean, std, low, high) in facts.stats.items():
        x = (ours[name].astype(ml_dtypes.bfloat16) if facts.rounded else ours[name]).astype(np.float64)
        if low == high or (std < 0.6 and name.endswith("resid_mix")):
            c_const.add(name, [x.mean(), x.min(), x.max()], [mean, low, high])
            continue
        n = x.size
        c_mean.add(name, (x.mean() - mean) / (std * np.sqrt(2 / n)), 0.0)
        c_std.add(name, (x.std() - std) / (std / np.sqrt(n)), 0.0)
        c_range.add(name, [x.min(), x.max()], [low, high])
    return [c_const, c_mean, c_std, c_range]


def _singular(ours: dict[str, np.ndarray], facts: Facts) -> list[Comparison]:
    """Orthogonality: smallest and largest singular value."""
    c = Comparison("init: singular values", 1e-4, "rel")
    for name, want in facts.singular.items():
        w = slice_of(ours, name)
        if w is None:
            c.fail(f"{name}: no such tensor here")
        else:
            values = np.linalg.svd(w.astype(np.float64), compute_uv=False)
            c.add(name, [values.min(), values.max()], np.array(want, np.float64))
    return [c]


def _routing(ctx: Context, recipe: Recipe, facts: Facts) -> list[Comparison]:
    """Storage dtype and optimizer group of every tensor."""
    c_dtype, c_group = Comparison("init: storage dtypes", 0.0, "equal"), Comparison("init: optimizer groups", 0.0, "equal")
    groups = route(recipe.optim, {name: leaf.role for name, leaf in leaves(recipe.model).items()})
    dtypes = storage_dtypes(recipe.model, "as_run")
    ours: dict[str, Any] = {}
    for tensor, (leaf, _) in tensor_names(recipe.model).items():
        ours[tensor] = (dtypes[leaf].name, groups[leaf])
    reference_names = {theirs: tensor for tensor, theirs in _spelling(ctx, recipe).items()}
    for name, dtype in facts.dtype.items():
        c_dtype.add(name, np.array(ours[reference_names[name]][0]) == np.array(dtype), True)
    for name, (kind, lr, decay) in facts.group.items():
        g = ours[reference_names[name]][1]
        c_group.add(name, [g.kind == kind, g.lr, g.weight_decay if kind != "frozen" else 0.0], [True, lr, decay])
    return [c_dtype, c_group]


def _spelling(ctx: Context, recipe: Recipe) -> dict[str, str]:
    """Canonical tensor name -> the PR's (a bank's name stands for its first slice)."""
    names = list(tensor_names(recipe.model))
    tagged = {n: np.array([i]) for i, n in enumerate(names)}
    return {names[int(np.ravel(tags)[0])]: name for name, tags in pr_names(ctx.recipe, recipe.model, tagged).items()}


def _stats(names: Any, table: np.ndarray) -> dict[str, np.ndarray]:
    return {str(n): np.asarray(row, np.float64) for n, row in zip(names, table, strict=True)}


def _read_372(z: Reference) -> Facts:
    names = [str(n) for n in z["names"]]
    shapes = dict(zip(names, map(tuple, json.loads(str(z["shapes_json"]))), strict=True))
    facts = Facts(int(z["total_params"]), shapes, _stats(names, z["stats_mean_std_min_max"]), rounded=True)
    facts.dtype = {n: str(d) for n, d in zip(names, z["dtype_train"], strict=True)}
    kinds = {"adam": "adamw", "muon": "muon"}
    for n, kind, lr, decay in zip(names, z["optimizer"], z["base_lr"], z["weight_decay"], strict=True):
        facts.group[n] = (kinds[str(kind)], float(lr), float(decay))
    for n, diagonal in zip(names, z["gram_diag_mean"], strict=True):
        if diagonal > 0 and not re.match(r"blocks\.[1-9]", n):  # of one layer: a decomposition takes a while
            value = float(np.sqrt(diagonal))
            facts.singular[n] = (value, value)
    return facts


def _read_562(z: Reference) -> Facts:
    names, h = json.loads(str(z["names"])), z.config()
    shapes = dict(zip(names, map(tuple, json.loads(str(z["shapes"]))), strict=True))
    facts = Facts(int(z["total_params"]), shapes, _stats(names, z["stats_mean_std_min_max"]), rounded=False)
    facts.singular = {n: tuple(v) for n, v in json.loads(str(z["svd_min_max"])).items()}
    low = set(json.loads(str(z["bf16_names"])))
    facts.dtype = {n: "bfloat16" if n in low else "float32" for n in names}
    decay = h["weight_decay"]
    for key, kind, lr in (("muon", "muon", "matrix_lr"), ("scalar", "adamw", "scalar_lr"), ("tok", "adamw", "tied_embed_lr")):
        facts.group |= {n: (kind, h[lr], decay) for n in json.loads(str(z[f"{key}_names"]))}
    return facts


def _read_638(z: Reference) -> Facts:
    table = json.loads(str(z["table"]))
    stats = {n: np.array(row["pre"]) for n, row in table.items()}
    facts = Facts(z.config()["n_params"], {n: tuple(row["shape"]) for n, row in table.items()}, stats, rounded=False)
    facts.singular = {n: tuple(v) for n, row in table.items() if (v := row.get("singular_min_max_precast"))}
    facts.dtype = {n: row["dtype"] for n, row in table.items()}
    facts.group = {n: ("muon" if row["group"] == "muon" else "adamw", row["lr"], row["wd"]) for n, row in table.items()}
    return facts


def _read_1182(z: Reference) -> Facts:
    names = [k.removeprefix("shape/") for k in z if k.startswith("shape/")]
    shapes = {n: tuple(int(v) for v in z[f"shape/{n}"]) for n in names}
    facts = Facts(int(z["total_params"]), shapes, {n: z[f"stat/{n}"] for n in names}, rounded=False)
    facts.singular = {n: tuple(v) for n, v in z.under("singular_min_max/").items()}
    facts.dtype = json.loads(str(z["dtype_as_run"]))
    for n, g in json.loads(str(z["optimizer_group"])).items():
        kind = "frozen" if g is None else "muon" if "muon" in g["optimizer"] else "adamw"
        facts.group[n] = (kind, g["base_lr"], g["weight_decay"]) if g else (kind, 0.0, 0.0)
    return facts


def _read_2005(z: Reference) -> Facts:
    names = [str(n) for n in z["names"]]
    shapes = {n: tuple(s) for n, s in json.loads(str(z["shapes"])).items()}
    facts = Facts(int(z["total_params"]), shapes, _stats(names, z["stats"]), rounded=False)
    facts.singular = {n: tuple(v) for n, v in json.loads(str(z["singular_value_range"])).items()}
    facts.dtype = {n: str(d).removeprefix("torch.") for n, d in zip(names, z["kept_dtype"], strict=True)}
    h = z.config()
    settings = {
        "muon": ("muon", h["matrix_lr"], h["muon_wd"]),
        "adamw_tok": ("adamw", h["tied_embed_lr"], h["embed_wd"]),
        "adamw_scalar": ("adamw", h["scalar_lr"], h["adam_wd"]),
    }
    facts.group = {n: settings[str(g)] for n, g in zip(names, z["group"], strict=True)}
    return facts


_READERS = {"pr372": _read_372, "pr562": _read_562, "pr638": _read_638, "pr1182": _read_1182, "pr2005": _read_2005}

"""Cross-framework checks: one function `(Context) -> list[CheckResult]` per kind of reference, all of them in `CHECKS`.

A check returns nothing where its reference files are absent.
"""

from collections.abc import Callable
from dataclasses import dataclass

from golf_jax.interop.checks.base import CheckResult, Context, detect
from golf_jax.interop.checks.end_to_end import check_end_to_end
from golf_jax.interop.checks.evaluation import check_eval, check_hessians, check_ttt
from golf_jax.interop.checks.forward import check_model, check_rope_long, check_variants
from golf_jax.interop.checks.gradients import check_gradients
from golf_jax.interop.checks.init import check_init
from golf_jax.interop.checks.optimizers import check_muon
from golf_jax.interop.checks.portable import check_steps
from golf_jax.interop.checks.quantization import check_quant
from golf_jax.interop.checks.schedule import check_loader, check_schedules
from golf_jax.interop.checks.training import check_train
from golf_jax.interop.checks.units import check_units


@dataclass(frozen=True)
class Check:
    """A check and what it needs."""

    run: Callable[[Context], list[CheckResult]]
    files: tuple[str, ...] = ()
    """It runs where any of these NAME.npz is."""
    portable: bool = False
    """It also runs on a portable file."""


CHECKS: dict[str, Check] = {
    "model": Check(check_model, ("model", "model_b"), portable=True),
    "variants": Check(check_variants, ("variants",)),
    "rope_long": Check(check_rope_long, ("rope_long",)),
    "units": Check(check_units, ("rope", "attn_gqa", "fakequant", "attn_unit", "hash", "units")),
    "grads": Check(check_gradients, ("grads", "grads_noqat", "grads_noloop", "variants"), portable=True),
    "muon": Check(check_muon, ("muon", "units")),
    "schedule": Check(check_schedules, ("sched", "train")),
    "data": Check(check_loader, ("loader", "train", "units")),
    "train": Check(check_train, ("train", "train_noqat", "train_prinit")),
    "steps": Check(check_steps, portable=True),
    "init": Check(check_init, ("init",)),
    "quant": Check(check_quant, ("quant", "quant_large"), portable=True),
    "hessians": Check(check_hessians, ("quant",), portable=True),
    "eval": Check(check_eval, ("eval", "eval2048"), portable=True),
    "e2e": Check(check_end_to_end, ("e2e", "train")),
    "ttt": Check(check_ttt, ("ttt", "ttt_4rank"), portable=True),
}


def applicable(ctx: Context) -> list[str]:
    """Names of the checks whose reference files are there."""
    return [name for name, check in CHECKS.items() if (check.portable if ctx.portable else any(map(ctx.has, check.files)))]


__all__ = ["CHECKS", "Check", "CheckResult", "Context", "applicable", "detect"]

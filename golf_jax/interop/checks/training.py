"""Training trajectories on stored batches, step by step."""

from typing import Any

import numpy as np

from golf_jax.config import GolfError
from golf_jax.interop.checks.reference import Arrays, Case, NotComputed
from golf_jax.interop.checks.simulate import History, simulate


def check_train(case: Case) -> None:
    recipe, run = case.recipe, history(case)
    factor = np.array(run.lr_factor)
    # Where a lone process clips what it computed itself, that norm is the gradient's; the averaged one is already clipped.
    alone = recipe.optim.clip_per_rank and recipe.data.ranks == 1
    ours: dict[str, Any] = {
        "loss": run.loss,
        "loss_per_rank": run.micro_loss,
        "grad_norm": np.ravel(run.rank_norm) if alone else run.grad_norm,
        "grad_norm_per_rank": run.rank_norm,
        "lr_factor": factor,
        "momentum": run.momentum,
        "looping": run.looping,
    }
    rare = {"stale_norm_per_rank": run.trigram_norm, "warmup_loss_per_rank": run.warm_up_loss, "swa_count": run.swa_count}
    ours |= {name: found for name, found in rare.items() if found}
    ours |= {f"lr/{g.name}": g.lr * factor for g in recipe.optim.groups}
    ours |= {f"after/{k}/{n}": x for k, tensors in run.after.items() for n, x in tensors.items()}
    for what, tensors in (("ema", run.ema), ("swa", run.swa)):
        ours |= {f"{what}/{n}": x for n, x in tensors.items()}
    for fact, tensors in (("norm", run.after[len(run.loss)]), ("ema_norm", run.ema)):
        ours |= {f"{fact}/{n}": np.linalg.norm(x.astype(np.float64)) for n, x in tensors.items()}
    case.compare(ours, start=case.tensors)


def history(case: Case) -> History:
    """Our run of the case, trained once."""

    def train() -> History:
        if "segments" in case.seen:
            raise NotComputed("training with attention inside documents (segments) is not implemented")
        recipe, tokens = case.recipe, case.seen["tokens"].astype(np.int32)
        steps, ranks, rows = len(tokens), recipe.data.ranks, recipe.data.rows_per_rank
        if tokens[0].size != ranks * rows * tokens.shape[-1]:
            raise GolfError(f"{case.refs.path}: {case.where}: tokens {tokens.shape} are not cut into {ranks} ranks of {rows} rows")
        keep = {int(k.split("/")[1]) for k in case.own if k.startswith("after/")}
        clear = bool(case.settings.get("clear_stale"))
        return simulate(case.refs, recipe, case.params, tokens.reshape(steps, ranks, rows, -1), keep, clear_stale=clear)

    return case.refs.once(("run", case.where), train)


def weights(case: Case, which: str) -> Arrays:
    """What our own run of the case leaves: final, ema or swa."""
    run = history(case)
    found = {"final": run.after[len(run.loss)], "ema": run.ema, "swa": run.swa}.get(which)
    if not found:
        raise GolfError(f"{case.refs.path}: own/{case.where}/{which}: the run leaves no such weights")
    return found

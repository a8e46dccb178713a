"""Training trajectories on stored batches, step by step."""

from dataclasses import replace
from typing import Any

import numpy as np

from golf_jax.config import GolfError
from golf_jax.interop.checks.reference import Arrays, Case
from golf_jax.interop.checks.simulate import Batches, History, simulate


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
    if run.trigram_norm:
        ours["stale_norm_per_rank"] = run.trigram_norm
    if run.warm_up_loss:
        ours["warmup_loss_per_rank"] = run.warm_up_loss
    if run.swa:
        ours["swa_count"] = run.swa_count
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
        recipe, tokens = case.recipe, case.seen["tokens"]
        if recipe.data.packed:  # its segments are stored: here seq_len only bounds how long they are
            recipe = replace(recipe, data=replace(recipe.data, seq_len=tokens.shape[-1] - 1, rows_per_rank=1))
        ranks, rows = recipe.data.ranks, recipe.data.rank_rows
        if tokens[0].size != ranks * rows * tokens.shape[-1]:
            raise GolfError(f"{case.refs.path}: {case.where}: tokens {tokens.shape} are not cut into {ranks} ranks of {rows} rows")
        keep = {int(k.split("/")[1]) for k in case.own if k.startswith("after/")}
        clear, batches = bool(case.settings.get("clear_stale")), stored_batches(case, ranks)
        warm = stored_batches(case, ranks, "warmup_") if "warmup_tokens" in case.own else None
        return simulate(case.refs, recipe, case.params, batches, keep, clear_stale=clear, warm=warm)

    return case.refs.once(("run", case.where), train)


def stored_batches(case: Case, ranks: int, prefix: str = "") -> Batches:
    """Batches of a case: those of the run, or with the prefix `warmup_` those of its discarded steps."""
    tokens, segments = case.seen[f"{prefix}tokens"], case.seen.get(f"{prefix}segments")
    cut = tokens.reshape(len(tokens), ranks, -1, tokens.shape[-1])
    return Batches(cut[..., :-1], cut[..., 1:], None if segments is None else segments.reshape(*cut.shape[:-1], -1))


def weights(case: Case, which: str) -> Arrays:
    """What our own run of the case leaves: final, ema or swa."""
    run = history(case)
    found = {"final": run.after[len(run.loss)], "ema": run.ema, "swa": run.swa}.get(which)
    if not found:
        raise GolfError(f"{case.refs.path}: own/{case.where}/{which}: the run leaves no such weights")
    return found

"""Is a reference set well-formed? Names, axes, settings and tolerances against docs/reference-format.md; nothing is computed."""

import re
from pathlib import Path

import numpy as np

from golf_jax.config import GolfError
from golf_jax.interop.comparison import MALFORMED
from golf_jax.interop.reference import Case, Set, is_input, tensor_of

# Section -> {items: axes}. One letter is one size within a case, T1 is T + 1, digits are sizes; "*": any shape; "tensor", "rows": that of
# the parameter (its first axis); "start": that of the trajectory's tensor.
_TEXT = {"tokens": "B T1", "segments": "B T", "loss": ""}
_STREAM = {
    "tokens": "N1", "base_bytes|leading_space|boundary": "V", "target_bytes": "N", "nats|count|bytes|bpb": "", "nll": "N",
    "scored_nll": "*", "windows": "W 3", "window_(nll|bytes)": "W",
}  # fmt: skip
ITEMS: dict[str, dict[str, str]] = {
    "params": {".+": "*"}, "init": {}, "schedule": {"step|seconds|lr_factor|momentum|looping": "S"}, "eval": _STREAM,
    "newton_schulz": {"input|fp32|bf16": "*"}, "units": {"(in|out)/.+": "*"},
    "model": _TEXT | {"logits": "B T V", "nll|logsumexp|ids/(bi|tri)gram": "B T", "layer_order": "S", "acts/.+": "*"},
    "grads": _TEXT | {"(grad|weight)/.+": "tensor", "grad_norm": ""},
    "optimizer": {"start/.+": "*", "(grad|after|momentum|mu|nu)/[0-9]+/.+": "start", "grad_norm": "S"},
    "loader": {"shard/[0-9]+|shard_lengths": "*", "tokens": "S R P T1", "segments": "S R P T", "drawn": "S R P 2"},
    "train": {
        "tokens": "S R P T1", "segments": "S R P T", "loss|grad_norm|lr_factor|lr/.+|momentum|looping": "S", "swa_count": "",
        "(loss|grad_norm|stale_norm)_per_rank": "S R", "warmup_loss_per_rank": "X R", "(after/[0-9]+|ema|swa)/.+": "tensor",
    },
    "quant": {
        "calibration": "B R T", "(codes|values|dequantized)/.+": "tensor", "(scale|clip)/.+": "rows",
        "hessian/.+|lowrank_[ab](_scale)?/.+|artifact": "*",
    },
    "ttt": _STREAM | {
        "chunk_nats": "C", "chunk_counts": "C 2", "docs": "D 3", "doc_nats": "D", "doc_counts": "D 2", "loss|grad_norm": "U", "lr": "*",
        "loss_per_rank": "U R", "window_chunk": "W", "(after/[0-9]+|final|final_change)/.+": "tensor",
    },
}  # fmt: skip
SETTINGS = {
    "": "config shipped note params inputs looping fake_quant tensors tolerances", "params": "base dtype", "init": "count rounded seed",
    "optimizer": "kind lr momentum weight_decay betas eps clip_norm bf16", "train": "clear_stale", "quant": "levels sigmas",
    "eval": "mode tokens targets", "ttt": "tokens", "units": "kind",
}  # fmt: skip
NEEDED = {"optimizer": ("kind", "lr"), "init": ("count",), "units": ("kind",)}


def problems(path: Path) -> list[str]:
    """What is wrong with a set, one line each; empty where it conforms."""
    try:
        refs = Set(path)
    except GolfError as e:
        return [str(e)]
    found = [f"reference.json lacks {k}" for k in ("made", "hyperparameters", "config") if k not in refs.json]
    for where in refs.items:
        case = refs.case(where)
        try:
            found += [f"{where}: {line}" for line in [*_arrays(case), *_settings(case)]]
        except (GolfError, KeyError) as e:
            found.append(f"{where}: refers to what is not there ({e})")
        except MALFORMED as e:
            found.append(f"{where}: not what the format asks for ({type(e).__name__}: {e})")
    return found


def _arrays(case: Case) -> list[str]:
    found, extra, sizes = [], case.refs.json.get("extra", {}), {}
    weights = case.stored if case.section in ("grads", "train", "quant", "ttt") else {}
    for item, x in sorted(case.seen.items(), key=lambda kv: kv[0] != "tokens"):  # tokens first: they fix the sizes
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            found.append(f"{item} is not finite")
        name, _, spec = item.partition("@")
        axes = next((a for pattern, a in ITEMS[case.section].items() if re.fullmatch(pattern, name)), None)
        if axes is None and name.split("/")[0] not in ("index", *extra):
            found.append(f"unknown item {item}: declare it in `extra`")
        if axes in (None, "*"):
            continue
        if axes in ("tensor", "rows", "start"):
            whole = case.seen.get(f"start/{tensor_of(name)}") if axes == "start" else weights.get(tensor_of(name))
            shape = None if whole is None else whole.shape[:1] if axes == "rows" else whole.shape
            if shape is not None and (part := np.broadcast_to(np.int8(0), shape)[case.index(spec)].shape) != x.shape:
                found.append(f"{item} is {x.shape}, expected {part}")
        elif not spec:
            letters = axes.split()
            wanted = [(a[0], n - 1) if a.endswith("1") and len(a) > 1 else (a, n) for a, n in zip(letters, x.shape, strict=False)]
            if len(letters) != x.ndim or any(n != (int(a) if a.isdigit() else sizes.setdefault(a, n)) for a, n in wanted):
                found.append(f"{item} is {x.shape}, which does not fit [{axes}] with {sizes}")
    return found


def _settings(case: Case) -> list[str]:
    s, extra = case.settings, case.refs.json.get("extra", {})
    known = {*SETTINGS[""].split(), *SETTINGS.get(case.section, "").split(), *extra}
    found = [f"unknown setting {k!r}: declare it in `extra`" for k in s if case.section != "units" and k not in known]
    found += [f"lacks the setting {k!r}" for k in NEEDED.get(case.section, ()) if k not in s]
    compared = {i: x.shape for i, x in case.own.items() if not is_input(case.section, i)}
    facts = {f"{fact}/{name}": () for name, about in s.get("tensors", {}).items() for fact in about} if case.section != "init" else {}
    for item, shape in (compared | facts).items():
        try:
            if item.partition("@")[0].split("/")[0] not in extra:
                case.bars(item, shape)
        except GolfError as e:
            found.append(str(e))
    return found

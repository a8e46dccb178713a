"""The rows of metrics.jsonl sent to a tracker as well: TensorBoard files in the run directory, or Weights & Biases. Off unless asked for.

A tracker is two functions. What it raises ends the tracking, never the run.
"""

import importlib
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from golf_jax.config import GolfError

LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(NamedTuple):
    row: Callable[[int, dict[str, float]], None]
    """Takes the numbers of one event at a step of training, by tag (`train/loss`)."""
    close: Callable[[], None]


def _tensorboard(library: Any, path: Path, config: dict[str, Any]) -> Tracker:
    writer = library.SummaryWriter(str(path / "tensorboard"))
    writer.add_text("config", textwrap.indent(json.dumps(config, indent=1), "    "))

    def row(step: int, scalars: dict[str, float]) -> None:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)

    return Tracker(row, writer.close)


def _wandb(library: Any, path: Path, config: dict[str, Any]) -> Tracker:
    # One run there for one directory here: a resumed run goes on in it, on our count of steps.
    run = library.init(project="golf_jax", id=path.name, name=path.name, dir=str(path), config=config, resume="allow")
    run.define_metric("*", step_metric="step")
    return Tracker(lambda step, scalars: run.log({"step": step, **scalars}), run.finish)


KINDS: dict[str, Callable[[Any, Path, dict[str, Any]], Tracker]] = {"tensorboard": _tensorboard, "wandb": _wandb}


def check_tracker(name: str) -> None:
    """Raises GolfError unless the tracker is known and its library is installed; "" is none."""
    if name and name not in KINDS:
        raise GolfError(f"--tracker {name}: not one of {', '.join(KINDS)}")
    if name:
        _library(name)


def open_tracker(name: str, path: Path, config: dict[str, Any]) -> Tracker:
    """The tracker of a run in `path`. config: its recipe, as JSON data."""
    return KINDS[name](_library(name), path, config)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(LIBRARIES[name])
    except ImportError:
        raise GolfError(f"--tracker {name}: needs {LIBRARIES[name]}; install the extra: pip install 'golf-jax[{name}]'") from None


def scalars(event: str, values: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, by tag: `train/loss`, `score/packed/sliding/val_bpb`."""
    tag = "/".join([event, *(values[k] for k in ("stage", "mode") if isinstance(values.get(k), str))])
    found = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "step"}
    return {f"{tag}/{k}": float(v) for k, v in found.items() if math.isfinite(v)}

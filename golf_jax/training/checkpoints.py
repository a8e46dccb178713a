"""Checkpoints of a running training: orbax, asynchronous, with everything a killed run needs to go on bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from golf_jax.config import GolfError, Recipe, to_dict
from golf_jax.training.state import TrainState


class Checkpoints:
    """The newest checkpoints under `directory`: the train state as arrays, position and clock as JSON. Nothing is pickled."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, recipe: Recipe, step: int, state: TrainState, seconds: float, position: dict[str, int]) -> None:
        """Start saving; returns once the device arrays are copied out."""
        meta = {"recipe": to_dict(recipe), "step": step, "seconds": seconds, "position": position}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), meta=ocp.args.JsonSave(meta))
        with self._reported(f"checkpoint {step} cannot be written"):
            self._manager.save(step, args=args)

    def restore(self, recipe: Recipe, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, meta) of the newest complete checkpoint, laid out like `like`; None if there is none.

        The number of devices may be another: Muon's batches are cut or padded, by the matrices of zeros that fill them up (`StackLayout`).
        Raises GolfError if it was made by another recipe (see `check_same_recipe`) or cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict())
        hint = f"remove {self.directory / str(step)} to go on from the one before"
        with self._reported(f"checkpoint {step} cannot be read; {hint}"):
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            check_same_recipe(recipe, meta["recipe"], self.directory)
            folder: Any = self.directory / str(step) / "state"
            check_same_shapes(like._asdict(), ocp.StandardCheckpointHandler().metadata(folder).tree)
            # Not strict: what the check lets through is padding, which orbax cuts or fills with zeros.
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract, strict=False)))["state"]
            return TrainState(**restored), meta

    def close(self) -> None:
        """Wait for the save under way."""
        with self._reported("the last checkpoint cannot be written"):
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        """Whatever orbax and tensorstore raise, as one line."""
        try:
            yield
        except GolfError:
            raise
        except Exception as error:
            detail = next(iter(str(error).splitlines()), type(error).__name__)
            raise GolfError(f"{self.directory}: {what} ({detail[:300]})") from error


def check_same_shapes(like: Any, stored: Any) -> None:
    """Raises ValueError unless both trees have leaves of the same shapes, up to the number of matrices in Muon's padded batches."""
    for (path, mine), theirs in zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(stored), strict=True):
        name = jax.tree_util.keystr(path)
        first = 1 if "'stacks'" in name else 0
        if mine.shape[first:] != theirs.shape[first:]:
            raise ValueError(f"{name} has the shape {theirs.shape} there and {mine.shape} here")


def check_same_recipe(recipe: Recipe, stored: dict[str, Any], where: str | Path) -> None:
    """Raises GolfError unless a run of `stored` (JSON data) may go on as `recipe`: all but reporting and scoring must agree."""
    free = ("log_every", "checkpoint_every", "eval", "quant", "micro_rows")
    mine = to_dict(recipe)
    different = sorted(k for k, v in mine.items() if k not in free and stored.get(k) != v)
    if different:
        raise GolfError(f"{where}: was made by a recipe that differs in {', '.join(different)}; give the same recipe and flags")

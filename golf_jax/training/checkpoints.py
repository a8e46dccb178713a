"""Checkpoints of a running training: orbax, asynchronous, with everything a killed run needs to go on bit for bit."""

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
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), meta=ocp.args.JsonSave(meta)))

    def restore(self, recipe: Recipe, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, meta) of the newest complete checkpoint, laid out like `like`; None if there is none.

        Raises GolfError if it was made by another recipe (budget and logging may differ) or cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict())
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            different = sorted(k for k, v in _fixed(to_dict(recipe)).items() if _fixed(meta["recipe"]).get(k) != v)
            if different:
                raise GolfError(f"{self.directory}: the checkpoint is of a recipe that differs in {', '.join(different)}")
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            if isinstance(error, GolfError):
                raise
            raise GolfError(f"{self.directory}: checkpoint {step} cannot be read: {str(error).splitlines()[0]}") from error
        return TrainState(**restored), meta

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _fixed(recipe: dict[str, Any]) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that goes on from it: all but how it is reported and scored."""
    return {k: v for k, v in recipe.items() if k not in ("log_every", "checkpoint_every", "eval", "quant", "micro_rows")}

"""When the state of a training is saved, and what happens when that fails or somebody asks the run to stop."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax

from golf_jax.config import GolfError, Recipe
from golf_jax.data.prefetch import Prefetcher
from golf_jax.interrupt import Interrupted, Signals
from golf_jax.processes import agreed, from_all
from golf_jax.training.checkpoints import Checkpoints
from golf_jax.training.resume import devices_of
from golf_jax.training.rundir import RunDir, go_on, start_again
from golf_jax.training.state import TrainState

SECONDS = 60.0  # of training between two checkpoints, where the recipe does not count steps
UNTRAINED = 0.999  # of the loss of a uniform distribution
ASK_EVERY = 10  # steps; several processes have to ask each other
LOOKAHEAD = 2 * ASK_EVERY  # batches: what one of them cannot read is told twice before its turn comes, and heard at least once


class Keeper:
    """Saves a run: at intervals, when it is asked to end, and at its end. `facts` go into every checkpoint (recipe, data)."""

    def __init__(self, recipe: Recipe, checkpoints: Checkpoints, run: RunDir, signals: Signals, facts: dict[str, Any]) -> None:
        self.recipe, self.checkpoints, self.run, self.signals, self.facts = recipe, checkpoints, run, signals, facts
        self._saved_step, self._saved_at = 0, 0.0
        self._told = 0  # step whose failing save was told; the last one is tried twice
        self._losses: dict[int, float] = {}  # of the states that were saved

    def starts_at(self, step: int, seconds: float) -> None:
        self._saved_step, self._saved_at = step, seconds

    @property
    def lookahead(self) -> int:
        """Batches to read ahead: two keep a device busy."""
        return LOOKAHEAD if jax.process_count() > 1 else 2

    def starts_with(self, batches: Prefetcher) -> None:
        """Raises, on all processes, what one of them finds among the batches before the others could hear of it."""
        if jax.process_count() > 1:
            for why in from_all(str(batches.trouble(self._ahead(self._saved_step)) or "")):
                if why:
                    raise GolfError(why)

    def _ahead(self, step: int) -> int:
        return min(LOOKAHEAD, self.recipe.budget.steps - step) if self.recipe.budget.steps else LOOKAHEAD

    def asked(self, step: int, seconds: float, batches: Prefetcher) -> tuple[int, bool, str]:
        """(signal that asks for the end or 0, whether a checkpoint is due, why there will be no more data), the same on every process.

        One process alone gets the last from `next(batches)`.
        """
        every = self.recipe.checkpoint_every
        on_step = bool(every) and step % every == 0
        if jax.process_count() > 1 and step % ASK_EVERY:
            return 0, on_step, ""
        error = batches.trouble(self._ahead(step)) if jax.process_count() > 1 else None
        if error and not isinstance(error, GolfError):
            raise error
        number, by_time, trouble = agreed(self.signals.number, not every and seconds - self._saved_at >= SECONDS, str(error or ""))
        return number, (on_step or by_time) and step > self._saved_step, trouble

    def save(self, step: int, state: TrainState, seconds: float, position: dict[str, int], loss: float, *, wait: bool = False) -> bool:
        """Whether it is saved: a full disk must not end a run that goes well without checkpoints."""
        sound = self._tried(self.checkpoints.wait, self._saved_step)  # the save before is told under its own step
        if step == self._saved_step and sound:
            return True
        self.run.sync()
        facts = {"position": position, "seconds": seconds, "loss": loss, **self.facts}
        if not self._tried(lambda: self.checkpoints.save(step, state, wait=wait, **facts), step):
            return False
        self.starts_at(step, seconds)
        return True

    def _tried(self, save: Callable[[], None], step: int) -> bool:
        try:
            save()
        except GolfError as error:
            if step != self._told:
                self.run.log(f"warning: {error}; the run goes on")
            self._told = step
            return False
        return True

    def stop(self, number: int, step: int, state: TrainState, seconds: float, position: dict[str, int], loss: float) -> Interrupted:
        """Save and say how to go on."""
        saved = self.save(step, state, seconds, position, loss, wait=True)
        if not step or not saved:
            return Interrupted(number, "nothing could be saved" if step else "")
        return Interrupted(number, f"saved after step {step}; go on with: {go_on(self.run.path)}")

    def without_data(self, why: str, step: int, state: TrainState, seconds: float, position: dict[str, int], loss: float) -> GolfError:
        """The training text cannot be read on: save what was trained, on all processes."""
        if not step or not self.save(step, state, seconds, position, loss, wait=True):
            return GolfError(why)
        return GolfError(f"{why}; saved after step {step}, then go on with: {go_on(self.run.path)}")  # the command ends the line

    def learned(self, step: int, loss: float) -> None:
        """The state after `step` steps has this loss."""
        if step == self._saved_step:
            self._losses[step] = loss

    def diverged(self, step: int, loss: float) -> GolfError:
        """The state after `step` steps has a loss that is not finite. Its checkpoint, and one that is no better than weights nobody has
        trained (which too high a rate leaves before it leaves NaN), are good for nothing and set aside."""
        with contextlib.suppress(GolfError):
            self.checkpoints.wait()
        for saved in self.checkpoints.steps():
            if saved == step or self._losses.get(saved, 0.0) > UNTRAINED * math.log(self.recipe.model.vocab_size):
                self.checkpoints.set_aside(saved, "diverged")
        left = self.checkpoints.steps()
        rates = [group.lr for group in self.recipe.optim.groups]
        field = f"optim.groups.{rates.index(max(rates))}.lr"
        what = f"step {step + 1}: the training loss is {loss}; lower the learning rates"
        if left:
            resume = f"{go_on(self.run.path)} --accept {field} --{field} N"
            return GolfError(f"{what} in a new run, or go on from checkpoint {left[0]} with lower ones: {resume}")
        again = start_again(self.run.path, devices_of(self.run.path))
        return GolfError(f"{what}: nothing worth going on from was kept; start again with: {again} --{field} N")

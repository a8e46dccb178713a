"""The loop: nothing is transferred unasked, budgets, reproducibility, failures, resuming."""

import json
import math
import re
import shlex
import shutil
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from made_runs import KEPT
from tiny_recipes import tiny

from golf_jax.config import BudgetConfig, GolfError, Recipe
from golf_jax.interrupt import Interrupted, Signals
from golf_jax.training import loop
from golf_jax.training.checkpoints import Checkpoints
from golf_jax.training.keep import Keeper
from golf_jax.training.rundir import RunDir

pytestmark = pytest.mark.usefixtures("quick_compilation")


def small(**changes) -> Recipe:
    """The smallest recipe, 6 steps: plain blocks, no averages."""
    return replace(tiny("baseline", steps=6), **changes)


def metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


class Dies:
    """A loader that breaks off before batch `last`."""

    def __init__(self, loader, last: int, error: Exception | None = None) -> None:
        self.loader, self.last, self.error = loader, last, error or OSError("the disk is gone")

    def next_batch(self):
        if self.loader.batches >= self.last:
            raise self.error
        return self.loader.next_batch()

    def __getattr__(self, name):
        return getattr(self.loader, name)


def test_an_implicit_transfer_inside_the_loop_is_refused(run_training, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "put_replicated", lambda mesh, tree: tree)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run_training(small(), tmp_path / "run")


def test_metrics_are_read_one_step_late(run_training, tmp_path, monkeypatch):
    events, compile_phases, read = [], loop.compile_phases, loop._Watch.step

    def recorded(*arguments):
        programs, seconds = compile_phases(*arguments)
        ((phase, program),) = programs.items()

        def step(*arguments):
            events.append("issue")
            return program(*arguments)

        return {phase: step}, seconds

    monkeypatch.setattr(loop, "compile_phases", recorded)
    monkeypatch.setattr(loop._Watch, "step", lambda self, step, *rest: (events.append(f"read {step}"), read(self, step, *rest)))
    run_training(small(), tmp_path / "run")
    assert events == ["issue", *[e for i in range(5) for e in ("issue", f"read {i}")], "read 5"]


def test_the_clock_ends_the_run_and_its_schedule(run_training, tmp_path):
    """3 seconds: stops in time, at a learning rate near zero."""
    recipe = small(budget=BudgetConfig(seconds=3.0))
    recipe = replace(recipe, schedule=replace(recipe.schedule, warmdown_frac=0.5), log_every=1000)
    trained = run_training(recipe, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    slowest = max(b["seconds"] - a["seconds"] for a, b in zip(rows, rows[1:], strict=False))
    assert 3.0 <= trained.seconds < 3.0 + 3 * slowest + 0.1
    assert trained.steps == len(rows) and trained.steps > 20
    factors = [row["lr_factor"] for row in rows]
    assert factors[0] == 1.0 and factors[-1] <= 2 * slowest / 1.5 + 0.01
    assert factors == sorted(factors, reverse=True)
    shortest = run_training(small(budget=BudgetConfig(seconds=1e-9)), tmp_path / "shortest")
    assert shortest.steps == 1 and np.isfinite(shortest.final_loss)


def test_a_run_on_steps_is_reproducible(run_training, tmp_path):
    one, two = (run_training(small(), tmp_path / name) for name in "ab")
    assert one.final_loss == two.final_loss
    for name, value in one.params.items():
        assert np.asarray(value).tobytes() == np.asarray(two.params[name]).tobytes(), name


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(run_training, tmp_path):
    recipe = small()
    groups = tuple(replace(g, lr=1e30) for g in recipe.optim.groups)
    with pytest.raises(GolfError, match=r"^step \d: the training loss is nan; .*start again with: (.*) N$") as caught:
        run_training(replace(recipe, optim=replace(recipe.optim, groups=groups)), tmp_path / "run")
    again = shlex.split(caught.value.args[0].partition(" with: ")[2])
    assert again[:4] == ["python", "-m", "golf_jax.train", f"{tmp_path}/run/config.json"] and again[-2] == "--optim.groups.0.lr"
    rows = metrics(tmp_path / "run")
    assert math.isfinite(rows[0]["loss"]) and rows[-1]["loss"] is None


def test_a_diverged_state_is_set_aside_and_the_one_before_goes_on(run_training, tmp_path):
    """Its weights are finite, its loss is not: the advice must not lead back to it."""
    recipe, path = replace(small(), checkpoint_every=1), tmp_path / "run"
    run_training(replace(recipe, budget=replace(recipe.budget, steps=2)), path)
    with closing(RunDir(path, resume=True)) as run, closing(Checkpoints(path / "checkpoints")) as checkpoints:
        hot = replace(recipe, optim=replace(recipe.optim, groups=(*recipe.optim.groups[:-1], replace(recipe.optim.groups[-1], lr=1e30))))
        error = Keeper(hot, checkpoints, run, Signals(), KEPT).diverged(2, math.nan)
    advice = "go on from checkpoint 1 with lower ones: python -m golf_jax.train --resume"
    assert "step 3: the training loss is nan" in str(error) and advice in str(error)
    assert f"--accept optim.groups.{len(recipe.optim.groups) - 1}.lr" in str(error)  # the highest rate, not always the first
    assert (path / "checkpoints/2.diverged").is_dir() and (path / "checkpoints/1").is_dir()
    run_training(recipe, path, resume=True)
    assert "resumed at step 1," in (path / "log.txt").read_text()
    assert [row["step"] for row in metrics(path)] == list(range(6))


def test_a_checkpoint_no_better_than_untrained_weights_is_no_advice(run_training, tmp_path):
    """Too high a rate leaves finite weights that predict nothing, and NaN some steps later."""
    recipe, path = replace(small(), checkpoint_every=1), tmp_path / "run"
    run_training(replace(recipe, budget=replace(recipe.budget, steps=2)), path)
    with closing(RunDir(path, resume=True)) as run, closing(Checkpoints(path / "checkpoints")) as checkpoints:
        keeper = Keeper(recipe, checkpoints, run, Signals(), KEPT)
        for step, loss in ((1, 3.0), (2, math.log(64) + 1e-4)):
            keeper.starts_at(step, 1.0)
            keeper.learned(step, loss)
        assert "or go on from checkpoint 1 with lower ones" in str(keeper.diverged(5, math.nan))
        assert checkpoints.steps() == [1]
        keeper.starts_at(1, 1.0)
        keeper.learned(1, 40.0)
        assert ": nothing worth going on from was kept; start again with: " in str(keeper.diverged(3, math.nan))


def test_what_was_trained_is_saved_when_the_text_cannot_be_read_on(run_training, tmp_path):
    with pytest.raises(GolfError, match=r"^a.bin: altered; saved after step 3, then go on with: python -m golf_jax.train --resume .*[^)]$"):
        run_training(small(), tmp_path / "run", loader=lambda source: Dies(source, 3, GolfError("a.bin: altered")))
    run_training(small(), tmp_path / "run", resume=True)
    assert "resumed at step 3," in (tmp_path / "run/log.txt").read_text()
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(6))


@pytest.fixture(scope="module")
def saved() -> Recipe:
    """Averages, momentum, a ramp of the sequence length and shuffled data; a checkpoint every second step."""
    recipe = tiny("baseline", steps=6)
    schedule = replace(recipe.schedule, ema_decay=0.9, export="ema", seq_lens=((0.0, 8), (0.5, 16)))
    return replace(recipe, schedule=schedule, data=replace(recipe.data, order="shuffled"), checkpoint_every=2)


def test_a_run_that_died_goes_on_bit_for_bit(run_training, tmp_path, saved):
    whole = run_training(saved, tmp_path / "whole")
    with pytest.raises(OSError, match="the disk is gone"):
        run_training(saved, tmp_path / "dies", loader=lambda source: Dies(source, 5))
    resumed = run_training(saved, tmp_path / "dies", resume=True)
    assert "resumed at step 4" in (tmp_path / "dies/log.txt").read_text()
    for name, value in whole.params.items():
        assert np.asarray(value).tobytes() == np.asarray(resumed.params[name]).tobytes(), name
    assert [r["loss"] for r in metrics(tmp_path / "dies")] == [r["loss"] for r in metrics(tmp_path / "whole")]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(run_training, tmp_path, saved):
    """Eight devices fill Muon's batches up with zeros, one does not; and back."""
    whole = run_training(saved, tmp_path / "whole")
    for last, devices in ((3, 8), (5, 1)):
        with pytest.raises(OSError, match="the disk is gone"):
            run_training(saved, tmp_path / "dies", devices=devices, resume=last > 3, loader=lambda source, last=last: Dies(source, last))
    resumed = run_training(saved, tmp_path / "dies", resume=True)
    log = (tmp_path / "dies/log.txt").read_text()
    assert "resumed at step 2" in log and "resumed at step 4" in log
    losses = [[r["loss"] for r in metrics(tmp_path / name)] for name in ("dies", "whole")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for name, value in whole.params.items():
        np.testing.assert_allclose(value, resumed.params[name], atol=1e-5, err_msg=name)


def test_a_signal_saves_and_says_how_to_go_on(run_training, tmp_path, saved):
    """Whatever `checkpoint_every` is: the step is finished, its state is saved, and the run goes on bit for bit."""
    whole = run_training(saved, tmp_path / "whole")
    signals = Signals()

    class Asks(Dies):
        def next_batch(self):
            if self.loader.batches >= self.last:
                signals.number = signal.SIGTERM
            return self.loader.next_batch()

    recipe = replace(saved, checkpoint_every=0)
    with pytest.raises(Interrupted, match=r"SIGTERM: saved after step \d; go on with: python -m golf_jax.train --resume .*/run") as stop:
        run_training(recipe, tmp_path / "run", signals=signals, loader=lambda source: Asks(source, 3))
    assert stop.value.status == 128 + signal.SIGTERM
    resumed = run_training(recipe, tmp_path / "run", resume=True)
    for name, value in whole.params.items():
        assert np.asarray(value).tobytes() == np.asarray(resumed.params[name]).tobytes(), name


def test_the_final_state_is_kept_without_any_checkpoint(run_training, tmp_path):
    """`checkpoint_every` 0 and a run of seconds: what was trained is on disk all the same, and so is the loss it ended with."""
    trained = run_training(small(), tmp_path / "run")
    assert trained.steps == 6 and [p.name for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()] == ["6"]
    assert run_training(small(), tmp_path / "run", resume=True).final_loss == trained.final_loss


def test_a_save_that_fails_in_the_background_is_told_under_its_own_step(run_training, tmp_path, saved, monkeypatch):
    """And that of the next step is tried all the same; the last one, once more."""
    finalize, failed = ocp.CheckpointManager._finalize, []

    def full(manager, step, *rest):
        if step in failed or step == 2:
            return finalize(manager, step, *rest)
        failed.append(step)
        manager._wait_for_checkpointers()
        shutil.rmtree(manager.directory / str(step))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "_finalize", full)
    run_training(saved, tmp_path / "run")
    log = (tmp_path / "run/log.txt").read_text()
    assert re.findall(r"checkpoint (\d) cannot be written \(No space left", log) == ["4", "6"] and failed == [4, 6]
    assert "training complete: step 6 is saved" in log and {"2", "6"} == {p.name for p in (tmp_path / "run/checkpoints").iterdir()}


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(run_training, tmp_path, saved, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    assert run_training(saved, tmp_path / "run").steps == 6
    log = (tmp_path / "run/log.txt").read_text()
    assert all(log.count(f"checkpoint {step} cannot be written (No space left on device); the run goes on") == 1 for step in (2, 4, 6))


def test_a_last_save_that_fails_twice_is_told_once(run_training, tmp_path, saved, monkeypatch):
    """Each by its own cause: no half is removed while orbax still writes it, of which the next save would tell, and tensorstore."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "_finalize", full)
    assert run_training(saved, tmp_path / "run").steps == 6
    log = (tmp_path / "run/log.txt").read_text()
    found = re.findall(r"checkpoint (\d) cannot be written \((.*)\)", log)
    assert found == [(step, "No space left on device") for step in "246"] and not list(
        tmp_path.glob("run/checkpoints/*.orbax-checkpoint-tmp")
    )

"""Kills and faults: no work is lost that was finished, nothing damaged is believed, and every message is one line."""

import json
import random
import shutil
import signal
from dataclasses import replace

import pytest
from killed_runs import NOTHING_KEPT, Runs
from tiny_recipes import build_text, environment, on_text, tiny

from golf_jax.config import Recipe
from golf_jax.pipeline import Options


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    text = build_text(tmp_path_factory.mktemp("text") / "data")
    return replace(on_text(tiny("baseline", vocab_size=300, seq_len=32), text), checkpoint_every=5)


KILLS, PER_RUN = 50, 3


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_with_the_artifact_of_the_unbroken_one(recipe, tmp_path, programs, monkeypatch):
    """A signal at, or a moment after, a file-system call of any stage; up to three times per run, then to its end."""
    for name, value in environment(programs).items():
        monkeypatch.setenv(name, value)
    runs, choose = Runs(recipe), random.Random(0)
    status, calls = runs.run(Options(str(tmp_path / "whole"), devices=1))
    whole = json.loads((tmp_path / "whole/result.json").read_text())
    assert status == 0 and calls > 100
    kills: list[str] = []
    for trial in range(10**6):
        if len(kills) >= KILLS:
            break
        path, left, resume = tmp_path / str(trial), PER_RUN, False
        while True:
            options = Options(resume=str(path), devices=1) if resume else Options(str(path), devices=1)
            at = choose.randint(1, calls) if left else 0
            number = choose.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
            status, _ = runs.run(options, at, number, choose.choice([0.0, choose.random()]))
            said = path.with_suffix(".txt").read_text()
            assert "Traceback" not in said and status in (0, -number, 128 + number, NOTHING_KEPT), f"{status} {number} {kills}\n{said}"
            if status == 0:
                break
            if status == NOTHING_KEPT:
                shutil.rmtree(path)
            else:
                kills.append(f"{trial} {number.name} at call {at}")
                left -= 1
            resume = (path / "config.json").exists()
        assert (path / "artifact.golf").read_bytes() == (tmp_path / "whole/artifact.golf").read_bytes(), kills[-PER_RUN:]
        result = json.loads((path / "result.json").read_text())
        assert result["train_loss"] == whole["train_loss"]
        assert {m: e["val_bpb"] for m, e in result["evaluations"].items()} == {m: e["val_bpb"] for m, e in whole["evaluations"].items()}
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["event"] == "train"] == list(range(recipe.budget.steps))
    print(f"{len(kills)} kills in {trial} runs: {kills}")

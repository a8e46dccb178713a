"""What the figures compute beyond what is drawn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="reports need the extra golf-jax[report]")

from golf_jax.config import load_recipe, to_dict  # noqa: E402
from golf_jax.reporting import figures  # noqa: E402
from golf_jax.reporting.record import Record  # noqa: E402


def test_phases_are_those_of_the_schedule():
    """PR 2005's depth recurrence from 35% of the run on; averaging every third step below a factor of 0.4."""
    recipe = load_recipe("pr2005")
    schedule = replace(recipe.schedule, loop_from=0.35, swa_every=3, swa_below=0.4)
    recipe = replace(recipe, budget=replace(recipe.budget, steps=20), schedule=schedule)
    rows = [{"step": s, "seconds": 1.0 * s, "lr_factor": min(1.0, 1 - (s - 10) / 10)} for s in range(20)]
    found = figures.phases_of(Record(Path(), "run", recipe, to_dict(recipe), rows))
    assert found == {
        "warmdown": [(11, 9)],
        "depth recurrence": [(7, 13)],
        "weight averaging": [(17, 1)],
    }


def test_smoothing_starts_unbiased():
    assert np.allclose(figures.smoothed([2.0] * 5, 4), 2.0)
    assert figures.smoothed([0.0, 1.0], 2)[-1] == pytest.approx(1 / 1.5)


def test_exported_names_keep_their_dots(tmp_path):
    run = Record(Path(), "run", load_recipe("quickstart"), {}, [{"step": s, "loss": 1.0 + s} for s in range(3)])
    figure = figures.training_loss([run], "step", "step")
    assert figure
    for name in ("lr=0.1", "lr=0.2"):
        figures.export(figure, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lr=0.1.png", "lr=0.1.svg", "lr=0.2.png", "lr=0.2.svg"]

"""Grids of runs: their points, running and going on, and the table at the end."""

import csv
import json
from dataclasses import replace

import pytest
from tiny_recipes import build_text, environment, on_text, recipe_file, tiny

from golf_jax import sweep
from golf_jax.config import GolfError, load_recipe
from golf_jax.sweeping import grid, parse_vary


def test_grid():
    points = grid(load_recipe("quickstart"), [1, 2], parse_vary(["optim.groups.0.lr=0.02,1", "model.smear_gate=true,false"]))
    assert len(points) == 8
    assert [p.name for p in points[:2]] == [f"optim.groups.0.lr=0.02-model.smear_gate=True-seed={s}" for s in (1, 2)]
    last = points[-1].recipe
    assert (last.optim.groups[0].lr, last.model.smear_gate, last.seed) == (1.0, False, 2)
    assert points[0].recipe.optim.groups[0].lr == 0.02 and points[0].recipe.optim.groups[1] == last.optim.groups[1]


@pytest.mark.parametrize(
    "vary, word",
    [
        ("optim.groups.0.lr", "give FIELD=VALUE"),
        ("seed=1,2", "--seeds"),
        ("optim.groups.9.lr=1", "no such field"),
        ("model.wdith=1", "no such field"),
        ("optim.groups.0=1", "is a section"),
        ("model.width=big", "expected int"),
        ("model.width=192,192", "given twice"),
    ],
)
def test_what_cannot_be_varied(vary, word):
    with pytest.raises(GolfError, match=word):
        grid(load_recipe("quickstart"), [1], parse_vary([vary]))


def test_sweep_goes_on_and_tells_what_failed(tmp_path, programs, monkeypatch, capsys):
    """Two settings run side by side and a third that cannot; the second call runs nothing again."""
    for name, value in environment(programs, devices=1).items():
        monkeypatch.setenv(name, value)
    recipe = on_text(tiny("baseline", steps=2, vocab_size=300), build_text(tmp_path / "text"))
    file = recipe_file(replace(recipe, eval=replace(recipe.eval, sliding=replace(recipe.eval.sliding, stride=0))), tmp_path / "r.py")
    folder = tmp_path / "sweep"
    arguments = [str(file), "--seeds", "5", "--vary", "optim.clip_norm=0.3,1", "--sweep-dir", str(folder), "--jobs", "2"]
    assert sweep.main(arguments) == 0
    first = capsys.readouterr().out
    assert "0 of them finished before" in first and "No setting is better than optim.clip_norm=0.3 beyond the noise." in first
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert [(r["settings"], r["seed"], r["steps"]) for r in rows] == [(f"optim.clip_norm={c}", "5", "2") for c in ("0.3", "1.0")]
    result = json.loads((folder / "optim.clip_norm=0.3-seed=5/result.json").read_text())
    assert float(rows[0]["val_bpb"]) == result["evaluations"]["standard"]["val_bpb"]
    assert "not testable" in (folder / "sweep.md").read_text()
    log = (folder / "optim.clip_norm=0.3-seed=5/log.txt").read_text()

    arguments[arguments.index("optim.clip_norm=0.3,1")] = "optim.clip_norm=0.3,1,-1"
    monkeypatch.setattr("golf_jax.sweeping._run_point", lambda point, *_: f"error: {point.recipe.optim.clip_norm}")
    assert sweep.main(arguments) == 1
    again = capsys.readouterr().out
    assert "2 of them finished before" in again and "optim.clip_norm=-1-seed=5: error: -1.0" in again
    assert (folder / "optim.clip_norm=0.3-seed=5/log.txt").read_text() == log
    with pytest.raises(GolfError, match="holds another run .*num_heads"):
        sweep.main([*arguments, "--model.num-heads", "2"])

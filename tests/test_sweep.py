"""Grids of runs: their points, running and going on, and the table at the end."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import made_runs
import pytest
from made_runs import TRAIN, evaluation
from tiny_recipes import build_text, environment, on_text, tiny

from golf_jax import sweep
from golf_jax.config import GolfError, load_recipe, to_dict
from golf_jax.files import sealed
from golf_jax.interrupt import Interrupted, catching
from golf_jax.sweeping import grid, miniature, parse_vary, run_grid


def test_grid():
    points = grid(load_recipe("quickstart"), [1, 2], parse_vary(["optim.groups.0.lr=0.02,1", "model.smear_gate=true,false"]))
    assert len(points) == 8
    assert [p.name for p in points[:2]] == [f"optim.groups.0.lr=0.02-model.smear_gate=True-seed={s}" for s in (1, 2)]
    last = points[-1].recipe
    assert (last.optim.groups[0].lr, last.model.smear_gate, last.seed) == (1.0, False, 2)
    assert points[0].recipe.optim.groups[0].lr == 0.02 and points[0].recipe.optim.groups[1] == last.optim.groups[1]


def test_a_miniature_keeps_every_share():
    full = load_recipe("pr562")
    full = replace(full, schedule=replace(full.schedule, ema_decay=0.999))
    small = miniature(replace(full, budget=replace(full.budget, steps=500)), 5_000)
    s = full.schedule
    assert (small.schedule.warmdown_steps, small.schedule.swa_every) == (s.warmdown_steps // 10, s.swa_every // 10) != (0, 0)
    assert 1 / (1 - small.schedule.ema_decay) == pytest.approx(0.1 / (1 - s.ema_decay))
    assert [g.momentum_warmup_steps for g in small.optim.groups if g.kind == "muon"] == [150]
    assert replace(small, schedule=s, optim=full.optim, budget=full.budget) == full
    for steps, word in ((0, "needs --budget.steps"), (5_000, "needs --budget.steps"), (3, "would average over 0.6")):
        with pytest.raises(GolfError, match=word):
            miniature(replace(full, budget=replace(full.budget, steps=steps)), 5_000)
    with pytest.raises(GolfError, match="--miniature-of -5: give the steps of the full run"):
        miniature(full, -5)


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


def made_up(point, directory, *more):
    """What a run leaves that a sweep reads; the setting that cannot train ends with a complaint."""
    if point.recipe.optim.clip_norm > 50:
        return "error: clip_norm"
    directory.mkdir(exist_ok=True)
    loss = 3.0 + 0.1 * point.recipe.seed - 0.01 * point.recipe.optim.clip_norm * (1 + 0.01 * point.recipe.seed)
    e = evaluation() | {"val_loss": loss, "val_bpb": loss / 2}
    stages = {"train": TRAIN | {"steps": 2}, "pack": made_runs.stages()["pack"], "evaluations": {"standard": e}}
    for name, content in (("config", to_dict(point.recipe)), ("stages", sealed(stages)), ("result", {})):
        (directory / f"{name}.json").write_text(json.dumps(content))
    (directory / "code.pyz").write_bytes(b"code")
    return ""


def test_table_and_going_on(tmp_path, monkeypatch, capsys):
    """Two settings with two seeds; the second call asks for a third setting, which fails, and runs nothing again."""
    asked = []
    monkeypatch.setattr("golf_jax.sweeping._run_point", lambda point, *more: asked.append(point.name) or made_up(point, *more))
    folder = tmp_path / "sweep"
    arguments = ["quickstart", "--seeds", "1,2,3", "--vary", "optim.clip_norm=0.3,1", "--sweep-dir", str(folder), "--jobs", "2"]
    assert sweep.main(arguments) == 0
    first, names = capsys.readouterr().out, [f"optim.clip_norm={c}-seed={s}" for c in ("0.3", "1") for s in (1, 2, 3)]
    assert sorted(asked) == names and "0 of them finished before" in first and "WARNING" not in first
    (folder / names[0] / "code.pyz").write_bytes(b"edited")  # while the sweep went on
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert [(r["run"], r["settings"], r["seed"], r["steps"]) for r in rows] == [
        (name, f"optim.clip_norm={c}", s, "2") for name, c, s in zip(names, ["0.3"] * 3 + ["1.0"] * 3, "123123", strict=True)
    ]
    assert float(rows[0]["val_bpb"]) == pytest.approx((3.1 - 0.00303) / 2)
    for text in (first, (folder / "sweep.md").read_text()):
        assert "Better than optim.clip_norm=0.3 beyond the noise: optim.clip_norm=1.0 by 0.00714 nats per token." in text
    arguments[arguments.index("optim.clip_norm=0.3,1")] = "optim.clip_norm=0.3,1,99"
    asked.clear()
    (folder / f"{names[1]}.json").touch()  # as a sweep leaves it that is killed when this run has just ended
    assert sweep.main(arguments) == 1
    assert not (folder / f"{names[1]}.json").exists()
    again = capsys.readouterr().out
    assert "WARNING: the runs did not run the same code" in again and "WARNING" in (folder / "sweep.md").read_text()
    assert sorted(asked) == [f"optim.clip_norm=99-seed={s}" for s in (1, 2, 3)]
    assert "6 of them finished before" in again and "optim.clip_norm=99-seed=2: error: clip_norm" in again
    asked.clear()
    (folder / names[0] / "stages.json").unlink()  # as advised where it was altered
    assert sweep.main(arguments) == 1 and names[0] in asked and names[1] not in asked
    with pytest.raises(GolfError, match="holds another run .*num_layers"):
        sweep.main([*arguments, "--model.num-layers", "2"])


def test_a_signal_is_passed_on_and_nothing_more_is_started(tmp_path, monkeypatch):
    """The runs save what they have before the sweep ends; the message says how to go on."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\ntrap "touch $4.saved; exit 143" TERM\ntouch $4.here\nwhile :; do sleep 0.05; done\n')
    program.chmod(0o755)
    monkeypatch.setattr("golf_jax.sweeping.sys.executable", str(program))

    def end():
        while not (tmp_path / "seed=1.here").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end).start()
    with pytest.raises(Interrupted, match=f"SIGTERM: go on with the same command and --sweep-dir {tmp_path}"), catching():
        run_grid(grid(load_recipe("baseline"), [1, 2], {}), tmp_path, 1, lambda line: None)
    assert (tmp_path / "seed=1.saved").exists() and not (tmp_path / "seed=2.here").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells it")
def test_a_run_ends_in_good_order_when_its_sweep_is_killed(tmp_path):
    run = tmp_path / "run.json"
    run.write_text(json.dumps(to_dict(load_recipe("quickstart"))))
    works = (
        "import signal, time, golf_jax.pipeline, golf_jax.sweeping\n"
        "def end(number, frame):\n    print('saved', flush=True)\n    raise SystemExit\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "golf_jax.pipeline.run = lambda *given: (print('runs', flush=True), time.sleep(60))\n"
        f"golf_jax.sweeping.main([{str(run)!r}, {str(tmp_path / 'run')!r}, '1'])\n"
    )
    sweeps = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {works!r}])"
    with subprocess.Popen([sys.executable, "-c", sweeps], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout
        assert killed.stdout.readline() == "runs\n"
        killed.kill()
        assert killed.stdout.read() == "saved\n"  # and nobody holds the pipe any more


def test_a_run_is_told_about_while_it_runs(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nsleep 0.3\nmkdir $4\necho "step:1/2" > $4/log.txt\nuntil [ -e $4/told ]; do sleep 0.05; done\n')
    program.chmod(0o755)
    monkeypatch.setattr("golf_jax.sweeping.sys.executable", str(program))
    monkeypatch.setattr("golf_jax.sweeping.SECONDS", 0.1)
    said = []

    def say(line):
        said.append(line)
        if "step:" in line:
            (tmp_path / "seed=1/told").touch()

    assert run_grid(grid(load_recipe("baseline"), [1], {}), tmp_path, 1, say) == {}
    assert said[1] == "  seed=1: starting" and said[-2:] == ["  seed=1: step:1/2", "  seed=1: done"]


def test_a_run_that_complains_in_another_encoding_fails_alone(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nprintf 'error: caf\\351\\n' >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr("golf_jax.sweeping.sys.executable", str(program))
    assert run_grid(grid(load_recipe("baseline"), [1], {}), tmp_path, 1, lambda line: None) == {"seed=1": "error: caf\ufffd"}


@pytest.mark.slow
def test_processes_side_by_side(tmp_path, programs, monkeypatch):
    """Real runs, one of them interrupted before: it goes on, and a run that cannot start says why."""
    for name, value in environment(programs, devices=1).items():
        monkeypatch.setenv(name, value)
    recipe = on_text(tiny("baseline", steps=2, vocab_size=300), build_text(tmp_path / "text"))
    points, said = grid(recipe, [5, 6], {}), []
    assert run_grid(points, tmp_path, 2, said.append) == {}
    result = tmp_path / "seed=5/result.json"
    before = json.loads(result.read_text())
    result.unlink()
    assert run_grid(points, tmp_path, 2, said.append) == {} and json.loads(result.read_text()) == before
    again = said[next(n for n, line in enumerate(said) if "1 of them finished before" in line) :]
    assert again[0].startswith("2 runs") and again[-1] == "  seed=5: done" and not any("seed=6" in line for line in again)
    assert any("seed=6: " in line and not line.endswith("done") for line in said)  # what it was at after 5 s
    lost = replace(recipe, data=replace(recipe.data, train=str(tmp_path / "no_*.bin")))
    problems = run_grid(grid(lost, [7], {}), tmp_path, 1, said.append)
    assert list(problems) == ["seed=7"] and problems["seed=7"].startswith("error: ")

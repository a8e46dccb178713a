"""Kills and faults: no work is lost that was finished, nothing damaged is believed, and every message is one line."""

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from killed_runs import NOTHING_KEPT, Runs
from tiny_recipes import build_text, environment, on_text, tiny

from golf_jax import pipeline
from golf_jax.config import GolfError, Recipe
from golf_jax.pipeline import Options
from golf_jax.training.resume import devices_of


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    text = build_text(tmp_path_factory.mktemp("text") / "data")
    return replace(on_text(tiny("baseline", vocab_size=300, seq_len=32), text), checkpoint_every=5)


def spoil(path: str, content: str | bytes = "") -> Any:
    """Writes `content` there before the run."""

    def write(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def pipe(path: str) -> Any:
    """Puts a pipe there before the run: whoever opened it would wait for ever."""

    def make(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(root / path)

    return make


FAULTS = [  # what is done in a folder that holds `data`, the options, the message
    (spoil("run"), {"run_dir": "run"}, "run: cannot write the run directory: File exists"),
    (spoil("file"), {"run_dir": "file/run"}, "file/run: cannot write the run directory: Not a directory"),
    (None, {"run_dir": "x" * 300}, "cannot write the run directory: File name too long"),
    (None, {"resume": "x" * 300}, r"cannot be read \(.*File name too long"),
    (None, {"resume": "nowhere"}, "nowhere: no run is there"),
    (spoil("run/config.json", "[]"), {"resume": "run"}, "run/config.json: "),
    (spoil("data/train_000000.bin", b"\0" * 5000), {"run_dir": "run"}, r"train_000000.bin: not a token shard \(magic 0"),
    (spoil("data/train_000000.bin", b"\0" * 500), {"run_dir": "run"}, "train_000000.bin: truncated, 500 bytes"),
    (spoil("data/tokenizer.model"), {"run_dir": "run"}, "tokenizer.model"),
    (pipe("pipe"), {"run_dir": "pipe"}, "pipe: cannot write the run directory"),
    (spoil("run/artifact.golf/x"), {"run_dir": "run"}, "run/artifact.golf: is a directory"),
    (pipe("run/config.json"), {"resume": "run"}, r"run/config.json: cannot be read \(a pipe"),
    (pipe("run/log.txt"), {"run_dir": "run"}, "run/log.txt: not a regular file"),
    (pipe("run/metrics.jsonl"), {"run_dir": "run"}, "run/metrics.jsonl: not a regular file"),
    (pipe("run/stages.json"), {"run_dir": "run"}, r"run/stages.json: cannot be read \(a pipe"),
    (pipe("data/train_000001.bin"), {"run_dir": "run"}, "train_000001.bin: cannot be read .not a regular file.$"),
    (spoil("run/config.json", '{"seed": 1, "name": "a", "budget": {"seconds": 1' + "0" * 400 + "}}"), {"resume": "run"}, "is not finite"),
    (spoil("run/config.json", '{"seed": NaN}'), {"resume": "run"}, "run/config.json: .*NaN is no finite number"),
]


@pytest.mark.parametrize(("spoils", "options", "message"), FAULTS)
def test_a_fault_is_one_line_before_anything_is_compiled(recipe, tmp_path, spoils, options, message):
    shutil.copytree(Path(recipe.data.train).parent, tmp_path / "data")
    if spoils:
        spoils(tmp_path)
    options = Options(**{name: str(tmp_path / value) for name, value in options.items()})
    with pytest.raises(GolfError, match=message) as caught:
        pipeline.run(on_text(recipe, tmp_path / "data"), options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["x", None, -1, [8], {"devices_used": "x"}])
def test_a_damaged_number_of_devices_is_refused_and_a_missing_one_unknown(tmp_path, value):
    """Taken for unknown it would let a run go on on other devices than its own, unsaid."""
    damaged = value if isinstance(value, dict) else {"devices": ["cpu"], "devices_used": value}
    (tmp_path / "environment.json").write_text(json.dumps(damaged))
    with pytest.raises(GolfError, match="environment.json: devices(_used)? is .*; put back what the run wrote, or remove it"):
        devices_of(tmp_path)
    (tmp_path / "environment.json").write_text(json.dumps({"devices": ["cpu"]}))
    assert devices_of(tmp_path) == 0
    (tmp_path / "environment.json").unlink()
    assert devices_of(tmp_path) == 0


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

"""Runs in processes of their own: two that train together, one that is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from tiny_recipes import SHIPPED, build_text, command, environment, on_text, recipe_file, tiny

from golf_jax import pipeline
from golf_jax.config import Recipe, ScoreFirstConfig
from golf_jax.processes import others_alive
from golf_jax.supervise import LOST, LOST_STATUS
from golf_jax.training.keep import ASK_EVERY

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return build_text(tmp_path_factory.mktemp("text") / "data")


def losses(path: Path) -> list[float]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "train"]


def start_pair(arguments: list[str], programs: Path, cwd: Path) -> list[subprocess.Popen]:
    """Two processes of 4 devices each, one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    environments = [environment(programs, 4, JAX_PROCESS_ID=str(i), **cluster) for i in range(2)]
    pipe = subprocess.PIPE
    return [subprocess.Popen(command(*arguments), env=e, cwd=cwd, stdout=pipe, stderr=pipe, text=True) for e in environments]


def finish(pair: list[subprocess.Popen], timeout: float = 500) -> list[tuple[str, str]]:
    try:
        return [process.communicate(timeout=timeout) for process in pair]
    finally:
        for process in pair:
            process.kill()


def two_processes_agree_with_one(recipe: Recipe, tmp_path: Path, programs: Path) -> None:
    one = pipeline.run(recipe, pipeline.Options(run_dir=str(tmp_path / "one")))
    file = recipe_file(recipe, tmp_path / "mine.py")
    pair = start_pair(["golf_jax.train", file], programs, tmp_path)  # the directory's name comes from process 0
    outputs = finish(pair)
    assert [process.returncode for process in pair] == [0, 0], outputs
    (two,) = (tmp_path / "runs").iterdir()
    result = json.loads((two / "result.json").read_text())
    assert len(losses(two)) == result["steps"] and (recipe.budget.steps == 0 or result["steps"] == one["steps"])
    if recipe.budget.steps:
        rel = 3e-4 if recipe.schedule.fake_quant_below else 3e-5  # in PR 372 a rounding can be a jump of a weight's code
        assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=rel)
        for mode, scored in one["evaluations"].items():
            assert result["evaluations"][mode]["val_bpb"] == pytest.approx(scored["val_bpb"], rel=3e-4)
    assert (two / "artifact.golf").stat().st_size == result["artifact_bytes"]
    assert "step:" in outputs[0][0] and "step:" not in outputs[1][0]  # only process 0 talks and writes
    if recipe.checkpoint_every:
        assert list((two / "checkpoints").glob("[0-9]*"))


def test_two_processes_train_and_score_as_one(tmp_path, text, programs):
    recipe = on_text(tiny("baseline", steps=4, vocab_size=300, seq_len=32), text)
    two_processes_agree_with_one(replace(recipe, checkpoint_every=2, eval=replace(recipe.eval, every=2)), tmp_path, programs)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED[1:])
def test_two_processes_train_every_record(name, tmp_path, text, programs):
    two_processes_agree_with_one(on_text(tiny(name, vocab_size=300, seq_len=32), text), tmp_path, programs)


@pytest.mark.parametrize("error", ["DEADLINE_EXCEEDED: GetKeyValue() timed out with key: golf_jax/7/1 and duration: 10m", "Gloo: closed"])
def test_a_process_that_is_gone_or_does_not_answer_is_one_line(error, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(status))
    with pytest.raises(SystemExit, match="3"), others_alive(lambda: "begin anew"):
        raise RuntimeError(error)
    assert capsys.readouterr().err == f"error: {LOST} ({error}); begin anew\n"


@pytest.mark.parametrize(("index", "whom"), [(0, "one or more of the others have not reached"), (1, "process 0 does not answer at")])
def test_a_process_that_waits_for_others_says_so_and_ends_in_one_line(index, whom):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": str(index)}
    code = "from golf_jax import processes as p; p.WAIT_SECONDS, p.TELL_EVERY = 4, 1; p.initialize_distributed()"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | cluster, capture_output=True, text=True, timeout=300, check=False)
    first, *_, last = done.stderr.splitlines()
    assert done.returncode == LOST_STATUS and f"of 4 s: this is process {index} of 3, and {whom} {address}" in first
    assert re.match(rf"error: after \d+ s not all processes of this job have connected: .*{whom}.*; .* start all processes again$", last)


@pytest.mark.slow
def test_two_processes_stop_by_one_clock(tmp_path, text, programs):
    """Process 0's clock decides: both take the same number of steps, or they would wait for each other forever."""
    recipe = on_text(tiny("baseline", steps=0, vocab_size=300, seq_len=32), text)
    recipe = replace(recipe, budget=replace(recipe.budget, seconds=3.0), schedule=replace(recipe.schedule, warmdown_frac=0.5))
    two_processes_agree_with_one(recipe, tmp_path, programs)


@pytest.mark.slow
def test_a_refusal_ends_both_processes(tmp_path, text, programs):
    """A run directory that is taken, seen by process 0 alone."""
    file = recipe_file(on_text(tiny("baseline", vocab_size=300), text), tmp_path / "mine.py")
    (tmp_path / "taken").mkdir()
    for name in ("config.json", "result.json"):  # a run that has kept something
        (tmp_path / "taken" / name).write_text("{}")
    begin = time.monotonic()
    pair = start_pair(["golf_jax.train", file, "--run-dir", "taken"], programs, tmp_path)
    outputs = finish(pair)
    assert [process.returncode for process in pair] == [2, 2]
    assert all("error: taken: holds a run already" in err for _, err in outputs)
    assert time.monotonic() - begin < 100


def wait_for_checkpoint(run: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    while not [p for p in (run / "checkpoints").glob("[0-9]*") if p.name.isdigit()]:
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_dies_the_other_says_so_and_both_go_on(victim, tmp_path, text, programs):
    """Within a minute, in one line, without a C++ stack; a resume of the two gives the artifact of a run that was left alone."""
    recipe = on_text(tiny("baseline", steps=150, vocab_size=300, seq_len=32), text)
    file = recipe_file(replace(recipe, checkpoint_every=10), tmp_path / "mine.py")
    outputs = finish(start_pair(["golf_jax.train", file, "--run-dir", "whole"], programs, tmp_path))
    pair = start_pair(["golf_jax.train", file, "--run-dir", "dies"], programs, tmp_path)
    wait_for_checkpoint(tmp_path / "dies", pair)
    pair[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    _, said = pair[1 - victim].communicate(timeout=100)
    assert pair[1 - victim].returncode == 3 and time.monotonic() - begin < 60
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "has ended" in line and line.endswith("python -m golf_jax.train --resume dies") and "Fatal" not in said and "***" not in said
    again = start_pair(["golf_jax.train", "--resume", "dies"], programs, tmp_path)
    outputs = finish(again)
    assert [process.returncode for process in again] == [0, 0], outputs
    assert 0 < int(re.search(r"resumed at step (\d+)", outputs[0][0])[1]) < 150
    assert (tmp_path / "dies/artifact.golf").read_bytes() == (tmp_path / "whole/artifact.golf").read_bytes()
    assert losses(tmp_path / "dies") == losses(tmp_path / "whole")


UNREADABLE = """
import os
from golf_jax.data.loader import StreamLoader
if os.environ["JAX_PROCESS_ID"] == "{process}":
    read = StreamLoader.next_batch
    def next_batch(self):
        if self.batches == {batch}:
            raise GolfError("train_000000.bin: was truncated")
        return read(self)
    StreamLoader.next_batch = next_batch
"""


@pytest.mark.slow
@pytest.mark.parametrize(("process", "batch", "saved"), [(1, 37, True), (0, 37, True), (1, 3, False)])
def test_when_one_of_two_cannot_read_on_both_save_and_go_on(process, batch, saved, tmp_path, text, programs):
    """A shard that one process cannot read ends both at one step, with its name and a checkpoint; nothing is lost."""
    recipe = on_text(tiny("baseline", steps=60, vocab_size=300, seq_len=32), text)
    file = recipe_file(replace(recipe, checkpoint_every=0), tmp_path / "mine.py")
    bad = tmp_path / "bad.py"
    bad.write_text(f"from golf_jax.config import GolfError\n{UNREADABLE.format(process=process, batch=batch)}\n{file.read_text()}")
    pair = start_pair(["golf_jax.train", bad, "--run-dir", "ends"], programs, tmp_path)
    outputs = finish(pair)
    assert [p.returncode for p in pair] == [2, 2], outputs
    if not saved:  # before anything was trained
        assert all("error: train_000000.bin: was truncated\n" in said for _, said in outputs)
        return
    for _, said in outputs:
        (step,) = re.findall(r"error: train_000000.bin: was truncated; saved after step (\d+), then go on with: .*--resume ends\n", said)
        assert batch - 2 * ASK_EVERY <= int(step) <= batch
    finish(start_pair(["golf_jax.train", file, "--run-dir", "whole"], programs, tmp_path))
    again = start_pair(["golf_jax.train", "--resume", "ends"], programs, tmp_path)
    outputs = finish(again)
    assert [p.returncode for p in again] == [0, 0] and f"resumed at step {step}," in outputs[0][0], outputs
    assert (tmp_path / "ends/artifact.golf").read_bytes() == (tmp_path / "whole/artifact.golf").read_bytes()


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, text, programs):
    """kill -9 in the middle; --resume gives the artifact of a run that was left alone."""
    recipe = on_text(tiny("pr2005", steps=100, vocab_size=300, seq_len=32), text)
    recipe = replace(recipe, checkpoint_every=5, eval=replace(recipe.eval, score_first=ScoreFirstConfig()))
    file = recipe_file(recipe, tmp_path / "mine.py")
    whole = pipeline.run(recipe, pipeline.Options(run_dir=str(tmp_path / "whole")))
    start = command("golf_jax.train", file, "--run-dir", "dies")
    process = subprocess.Popen(start, env=environment(programs), cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_for_checkpoint(tmp_path / "dies", [process])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "dies/result.json").exists()
    again = command("golf_jax.train", "--resume", "dies")
    done = subprocess.run(again, env=environment(programs), cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert 0 < int(re.search(r"resumed at step (\d+)", done.stdout)[1]) < 100
    assert (tmp_path / "dies/artifact.golf").read_bytes() == (tmp_path / "whole/artifact.golf").read_bytes()
    assert losses(tmp_path / "dies") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == whole["steps"]

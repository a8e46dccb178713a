"""The run directory: what it refuses and what it says when the disk does."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from golf_jax.config import GolfError
from golf_jax.training.rundir import RunDir, environment


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_directory_that_holds_a_run_is_refused(tmp_path):
    run = RunDir(tmp_path / "run")
    run.write("config.json", {"name": "x"})
    run.close()
    with pytest.raises(GolfError, match="holds a run already; give another --run-dir, or --resume"):
        RunDir(tmp_path / "run")
    RunDir(tmp_path / "run", resume=True).close()


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(GolfError, match="--resume .*: no run is there"):
        RunDir(tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GolfError, match="cannot write the run directory: Not a directory"):
        RunDir(tmp_path / "file" / "run")


def test_a_full_disk_is_one_line(tmp_path):
    """Log, metrics and files: the error names the file; a file is there whole or not at all."""
    run = RunDir(tmp_path / "run")
    with files_of_at_most(4096), pytest.raises(GolfError, match=r"artifact.golf: cannot write: File too large"):
        run.write("artifact.golf", bytes(100_000))
    assert not (tmp_path / "run/artifact.golf").exists() and not list((tmp_path / "run").glob("*.part"))
    run.close()
    run._log = run._metrics = open("/dev/full", "w")
    with pytest.raises(GolfError, match="/dev/full: cannot write: No space left on device"):
        run.log("a line")
    with pytest.raises(GolfError, match="/dev/full: cannot write: No space left on device"):
        run.metrics(step=0, loss=1.0)
    run.close()


def test_metrics_are_on_disk_at_once_and_cut_on_resume(tmp_path):
    run = RunDir(tmp_path / "run")
    for step in range(5):
        run.metrics(step=step, loss=float(step))
    file = tmp_path / "run/metrics.jsonl"
    assert len(file.read_text().splitlines()) == 5
    with open(file, "a") as half:
        half.write('{"step": 5, "lo')  # killed in the middle of a line
    run.truncate_metrics(3)
    run.metrics(step=3, loss=9.0)
    run.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2, 3]


def test_environment_names_versions_and_devices():
    facts = environment()
    assert facts["packages"]["jax"] and len(facts["devices"]) == 8 and facts["processes"] == 1
    json.dumps(facts)

"""The run directory: what it refuses and what it says when the disk does."""

import io
import json
import os
import pty
import resource
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from made_runs import TRAIN

from golf_jax.config import GolfError, load_recipe
from golf_jax.interrupt import Signals
from golf_jax.training.keep import Keeper
from golf_jax.training.rundir import RunDir, all_again, environment, new_path


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("left", ["checkpoints/5/state", "artifact.golf", "result.json"])
def test_a_directory_that_holds_a_run_is_refused(tmp_path, left):
    run = RunDir(tmp_path / "run")
    run.write("config.json", {"name": "x"})
    run.write(left, "x")
    run.close()
    with pytest.raises(GolfError, match="holds a run already; give another --run-dir, or --resume"):
        RunDir(tmp_path / "run")
    RunDir(tmp_path / "run", resume=True).close()


def test_a_run_that_kept_nothing_is_started_again_in_its_place(tmp_path):
    """Ended while it compiled, or before its first checkpoint: its rows are not those of the run that follows."""
    for _ in range(2):
        run = RunDir(tmp_path / "run")
        assert not run.record
        run.write("config.json", {"name": "x"})
        run.note("train", TRAIN)
        run.metrics("train", step=0, loss=1.0)
        run.log("a line")
        run.close()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1 and (tmp_path / "run/log.txt").read_text() == "a line\n"


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(GolfError, match="nowhere: no run is there"):
        RunDir(tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GolfError, match="cannot write the run directory: Not a directory"):
        RunDir(tmp_path / "file" / "run")


def test_a_full_disk_ends_no_run(tmp_path, capsys):
    """A file is there whole or not at all, and the error names it; lines that cannot be written are missed once and aloud."""
    run = RunDir(tmp_path / "run")
    with files_of_at_most(4096), pytest.raises(GolfError, match=r"artifact.golf: cannot be written \(File too large"):
        run.write("artifact.golf", bytes(100_000))
    assert not (tmp_path / "run/artifact.golf").exists() and not list((tmp_path / "run").glob("*.tmp"))
    run._log = run._metrics = open("/dev/full", "w")
    run.log("a line")
    run.metrics("train", step=0, loss=1.0)
    run.close()
    assert capsys.readouterr().out == "a line\nwarning: /dev/full: cannot write: No space left on device; the run goes on\n"


@pytest.mark.parametrize("where", ["closed pipe", "/dev/full"])
def test_a_terminal_that_is_gone_ends_no_run(tmp_path, monkeypatch, where):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w") if where == "closed pipe" else open(where, "w"))
    run = RunDir(tmp_path / "run")
    run.log("one")
    run.log("two")
    run.close()
    assert (tmp_path / "run/log.txt").read_text() == "one\ntwo\n"


def test_a_terminal_that_nobody_gave_a_size_has_eighty_columns(tmp_path, monkeypatch):
    """As of `docker run -t`, `ssh -tt` or `expect`: its width is 0."""
    ours, theirs = pty.openpty()
    monkeypatch.setattr(sys, "stdout", os.fdopen(theirs, "w"))
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    monkeypatch.delenv("COLUMNS", raising=False)
    run = RunDir(tmp_path / "run")
    run.log("word " * 30)
    run.live("x" * 100)
    run.close()
    assert max(map(len, os.read(ours, 10_000).decode().replace("\r\x1b[K", "\n").splitlines())) <= 80


def test_a_name_that_is_not_utf_8_is_refused_at_once_and_written_as_an_escape(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9")
    with pytest.raises(GolfError, match="not UTF-8"):
        RunDir(name)
    assert not os.path.exists(name)
    run = RunDir(tmp_path / "run")
    run.log(f"data from {name}")
    run.write("notes.md", f"data from {name}")
    run.close()
    assert all((run.path / file).read_text().strip().endswith("\\udce9") for file in ("log.txt", "notes.md"))


@pytest.mark.parametrize(("length", "refused"), [(3900, False), (3960, True), (4095, True)])
def test_a_directory_below_which_no_checkpoint_has_room_is_refused_at_once(tmp_path, length, refused):
    path = str(tmp_path)
    while len(path) < length - 200:
        path += "/" + "x" * 99
    path += "/" + "x" * (length - len(path) - 1)
    if refused:
        with pytest.raises(GolfError, match=f"{length:,} bytes, and no checkpoint can be written below more than 3,936"):
            RunDir(path)
        assert not list(tmp_path.iterdir())
    else:
        RunDir(path).close()
        assert len(path) == length and os.path.exists(path)


def test_only_what_was_kept_is_gone_on_with_when_a_process_is_lost(tmp_path):
    run = RunDir(tmp_path / "a run")
    assert all_again(run.path).startswith("start all processes again with the same command")
    run.write("checkpoints/5/state", "x")
    run.close()
    assert all_again(run.path).endswith(f"python -m golf_jax.train --resume '{tmp_path}/a run'")


def test_a_terminal_without_unicode_shows_escapes(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    run = RunDir(tmp_path / "run")
    run.log("bpb \u2581")
    run.close()
    assert buffer.getvalue() == b"bpb \\u2581\n"


def test_one_process_at_a_time(tmp_path):
    run = RunDir(tmp_path / "run")
    run.write("config.json", {})
    with pytest.raises(GolfError, match="run: another process works in this directory"):
        RunDir(tmp_path / "run", resume=True)
    run.close()
    RunDir(tmp_path / "run", resume=True).close()


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_directory_that_is_gone_ends_the_run_and_is_not_made_anew(tmp_path, how):
    run = RunDir(tmp_path / "run")
    if how == "removed":
        shutil.rmtree(run.path)
    else:
        run.path.rename(tmp_path / "elsewhere")
    if how == "replaced":
        RunDir(tmp_path / "run").close()
    before = sorted(tmp_path.rglob("*"))
    for work in (lambda: run.metrics("train", step=0, loss=1.0), lambda: run.write("artifact.golf", b""), lambda: run.note("train", TRAIN)):
        with pytest.raises(GolfError, match="run: was removed, moved or replaced while the run worked in it .* --resume and its new name"):
            work()
    run.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_half_a_file_of_a_killed_process_is_removed(tmp_path, monkeypatch):
    run = RunDir(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(os, "unlink", lambda *_: None)
        run.write("config.json", {})
    run.close()
    assert list(run.path.glob(".config.json.*"))
    RunDir(run.path).close()
    assert not list(run.path.glob(".*"))


def test_default_names_do_not_collide(tmp_path):
    with ThreadPoolExecutor(8) as starts:
        paths = set(starts.map(lambda _: new_path(tmp_path / "runs", "mine"), range(20)))
    assert len(paths) == 20 and all(path.is_dir() for path in paths)


@pytest.mark.parametrize("damage", [b'{"step": 5, "lo', b'"x}', b"\xff\xfe}", b"\0" * 40, b"[1]", b"{}", b'{"event": 3}', b"[" * 5000])
def test_metrics_are_on_disk_at_once_and_survive_any_damage(tmp_path, damage):
    run = RunDir(tmp_path / "run")
    for step in range(5):
        run.metrics("train", step=step, loss=float(step))
    run.write("config.json", {})
    run.close()
    file = tmp_path / "run/metrics.jsonl"
    assert len(file.read_text().splitlines()) == 5
    with open(file, "ab") as half:
        half.write(damage)  # killed in the middle of a line, or worse
    run = RunDir(tmp_path / "run", resume=True)
    run.truncate_metrics(3)
    run.metrics("train", step=3, loss=float("nan"))
    rows = run.rows()
    run.close()
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, None)]


def test_no_step_or_stage_is_on_the_disk_before_its_rows(tmp_path, monkeypatch):
    """Else a power loss leaves a checkpoint or a finished stage whose rows and lines nobody makes again."""
    synced, fsync = {}, os.fsync

    def watched(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    monkeypatch.setattr(os, "fsync", watched)
    files = [tmp_path / "run" / name for name in ("log.txt", "metrics.jsonl")]
    seen = []

    def before(*args, **facts):
        seen.append([synced.get(file.stat().st_ino) == file.stat().st_size > 0 for file in files])

    with closing(RunDir(tmp_path / "run")) as run:
        monkeypatch.setattr(run, "write", before)
        run.log("a line")
        run.metrics("score", stage="packed", mode="standard")
        run.note("evaluations", {})
        run.metrics("train", step=0, loss=1.0)
        checkpoints: Any = SimpleNamespace(wait=lambda: None, save=before)
        keeper = Keeper(load_recipe("quickstart"), checkpoints, run, Signals(), {})
        assert keeper.save(1, cast(Any, None), 0.1, {}, 1.0)
    assert seen == [[True, True]] * 2


def test_scores_that_are_to_be_found_again_have_one_row(tmp_path):
    run = RunDir(tmp_path / "run")
    run.metrics("train", step=0, loss=1.0)
    run.metrics("score", stage="pre_quantization", mode="standard")
    for mode in ("standard", "sliding"):
        run.metrics("score", stage="packed", mode=mode)
    run.record["evaluations"] = {"standard": {}}
    for packed, left in ((True, [None, "standard", "standard"]), (False, [None])):
        run.drop_scores(packed)
        assert [row.get("mode") for row in run.rows()] == left
    run.close()


def test_the_record_of_finished_stages_comes_back(tmp_path):
    run = RunDir(tmp_path / "run")
    run.note("train", TRAIN | {"steps": 3})
    run.write("config.json", {})
    run.close()
    again = RunDir(tmp_path / "run", resume=True)
    assert again.record == {"train": TRAIN | {"steps": 3}}
    again.close()
    whole = (tmp_path / "run/stages.json").read_text()
    for damage in ("[]", "3", "{", '"x"', '{"pack": []}', whole.replace(": 3,", ": 4,")):
        (tmp_path / "run/stages.json").write_text(damage)
        with pytest.raises(GolfError, match="stages.json.*; remove it to repeat what follows training") as caught:
            RunDir(tmp_path / "run", resume=True)
        assert "\n" not in str(caught.value)


def test_environment_names_versions_and_devices():
    facts = environment()
    assert facts["packages"]["jax"] and len(facts["devices"]) == 8 and facts["processes"] == 1
    json.dumps(facts)

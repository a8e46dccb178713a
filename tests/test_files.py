"""Files are written whole or not at all, where that was promised before the work began."""

import errno
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from golf_jax.config import GolfError
from golf_jax.files import NotWritten, check_target, write_atomic
from golf_jax.interop.safetensors import write_safetensors


def test_a_full_disk_leaves_what_was_there(tmp_path):
    target = tmp_path / "x.safetensors"
    target.write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(NotWritten, match=r"x.safetensors: cannot be written \(File too large\)"):
            write_safetensors({"a": np.zeros(5000, np.float32)}, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [target.name] and target.read_text() == "before"


def test_a_disk_that_becomes_read_only_meanwhile_is_named(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), paths[0])

    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(NotWritten, match=r"x.json: cannot be written \(Read-only file system\)"):
        write_atomic(tmp_path / "x.json", b"text")


def test_a_name_outlives_a_power_loss_as_its_content_does(tmp_path, monkeypatch):
    """The folder is synced after the rename, the content before it."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_ino, (tmp_path / "x").exists())))
    write_atomic(tmp_path / "x", b"text")
    assert synced == [((tmp_path / "x").stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_links_and_devices_are_written_through(tmp_path, capfd):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomic(tmp_path / "link", b"text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    write_atomic("/dev/stdout", b"te", b"xt\n")
    assert capfd.readouterr().out == "text\n"
    with pytest.raises(NotWritten, match="Is a directory"):
        write_atomic(tmp_path, b"text")


def test_a_file_behind_stdout_keeps_what_was_printed(tmp_path):
    code = "from golf_jax.files import write_atomic; print('before'); write_atomic('/dev/stdout', b'{}\\n'); print('after')"
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "before\n{}\nafter\n"


def test_a_full_disk_leaves_what_a_link_names(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.open("/dev/full/none", os.O_RDONLY))
    with pytest.raises(NotWritten):
        write_atomic(tmp_path / "link", b"text")
    assert (tmp_path / "file").read_text() == "before" and len([*tmp_path.iterdir()]) == 2


def test_a_place_where_no_file_can_be_made_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "old.json").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(GolfError, match=r"old.json: cannot be written \(permission denied\)"):
        check_target(tmp_path / "old.json")
    check_target("/dev/null")


@pytest.mark.parametrize("name", ["artifact.golf", "metrics.jsonl", "result.json"])
def test_a_report_or_a_result_does_not_replace_a_file_of_a_run(tmp_path, name):
    """`report RUN --out RUN/artifact.golf`, `evaluate RUN --json RUN/result.json`."""
    for file in ("run.lock", name):
        (tmp_path / file).touch()
    with pytest.raises(GolfError, match=f"{name}: is a file of the run in that directory"):
        check_target(tmp_path / name)
    check_target(tmp_path / "report.html")
    (tmp_path / "run.lock").unlink()
    check_target(tmp_path / name)

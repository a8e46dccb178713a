"""Altered files of every kind: read, or refused with one line; never a traceback, never much memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile_files
import pytest

from golf_jax.config import GolfError
from golf_jax.data.documents import read_documents
from golf_jax.data.shards import open_shard
from golf_jax.data.tokenizer import Tokenizer
from golf_jax.interop import open_model
from golf_jax.interop.reference import read_npz
from golf_jax.opening import load


def check(report):
    for kind, outcomes in report["outcomes"].items():
        assert set(outcomes) <= {"read", "refused"}, (kind, outcomes)
    assert report["slowest_seconds"] < 10


def test_altered_files_are_read_or_refused(tmp_path):
    check(hostile_files.run(200, 1, tmp_path))


@pytest.mark.slow
def test_five_thousand_altered_files_in_bounded_memory(tmp_path):
    command = [sys.executable, str(Path(hostile_files.__file__)), "5000", "2", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=1200)
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout))


OPENED = {"x.golf": load, "x.bin": open_shard, "x.model": Tokenizer, "x.npz": read_npz}
OPENED |= dict.fromkeys(("x.txt", "x.jsonl"), lambda path: list(read_documents([path])))
OPENED |= dict.fromkeys(("x.pt", "x.ptz", "x.safetensors"), lambda path: open_model(str(path)))


@pytest.mark.parametrize("name", OPENED)
def test_a_git_lfs_pointer_is_told_as_that(tmp_path, name):
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 15900000\n")
    with pytest.raises(GolfError, match=f"{name}: a Git LFS pointer, not the file itself; fetch it: git lfs pull$"):
        OPENED[name](tmp_path / name)

"""Altered files of every kind: read, or refused with one line; never a traceback, never much memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile_files
import pytest


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

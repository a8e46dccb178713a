"""Progress: work whose length is known, unknown, or that cannot say how far it is."""

import threading
from types import SimpleNamespace

from golf_jax import progress
from golf_jax.progress import Progress, patience


def test_work_is_told_about_every_five_seconds(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    unknown, known = Progress(said.append, "documents:"), Progress(said.append, "windows", 100)
    for second in range(1, 20):
        now[0] = float(second)
        unknown.at(second * 1000)
        known.at(second * 5)
    assert [line for line in said if "documents" in line] == [f"documents: {n},000 in {n}.0 s" for n in (5, 10, 15)]
    assert [line for line in said if "windows" in line][0] == "windows 5 of 100 in 1.0 s, 20 s projected"


def test_what_takes_long_is_told_once_and_what_does_not_never(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    told = threading.Event()
    with patience(lambda line: told.set() if line == "compiling ..." else None, "compiling"):
        assert told.wait(10)
    said = []
    monkeypatch.setattr(progress, "SECONDS", 60)
    with patience(said.append, "compiling"), patience(None, "compiling"):
        pass
    assert not said and threading.active_count() < 50

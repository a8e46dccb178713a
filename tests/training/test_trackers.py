"""Trackers get the rows that metrics.jsonl has; what they do wrong never ends a run."""

import json
import sys
from types import SimpleNamespace

import pytest

from golf_jax.config import GolfError
from golf_jax.training.rundir import RunDir
from golf_jax.training.trackers import check_tracker, scalars


class StandIn:
    """Either library, writing down what it is told."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.told.append((name, args, kwargs))
            return self

        return call


def run_with(tmp_path, name):
    run = RunDir(tmp_path / "run")
    run.track(name, {"model": {"width": 8}})
    run.metrics("train", step=3, loss=2.5, grad_norm=float("nan"))
    run.metrics("score", stage="packed", mode="sliding", val_bpb=1.25, legal=True, facts={"covered": 9})
    run.log("on")
    run.close()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["train", "score"]
    return (tmp_path / "run/log.txt").read_text()


def test_tensorboard(tmp_path, monkeypatch):
    library = StandIn()
    monkeypatch.setitem(sys.modules, "tensorboardX", library)
    check_tracker("tensorboard")
    run_with(tmp_path, "tensorboard")
    assert library.told[0] == ("SummaryWriter", (str(tmp_path / "run/tensorboard"),), {})
    assert library.told[1][0] == "add_text" and '"width": 8' in library.told[1][1][1]
    assert library.told[2:4] == [("add_scalar", ("train/loss", 2.5, 3), {}), ("add_scalar", ("score/packed/sliding/val_bpb", 1.25, 3), {})]
    assert [name for name, *_ in library.told[4:]] == ["close"]


def test_wandb(tmp_path, monkeypatch):
    library = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", library)
    run_with(tmp_path, "wandb")
    name, _, given = library.told[0]
    assert name == "init" and given["id"] == "run" and given["config"] == {"model": {"width": 8}} and given["resume"] == "allow"
    assert [args for name, args, _ in library.told if name == "log"] == [
        ({"step": 3, "train/loss": 2.5},), ({"step": 3, "score/packed/sliding/val_bpb": 1.25},)
    ]  # fmt: skip
    assert library.told[-1][0] == "finish"


def test_a_tracker_out_of_order_is_said_once(tmp_path, monkeypatch):
    def lost(*_):
        raise ConnectionError("no network\nand more")

    writer = SimpleNamespace(add_text=print, add_scalar=lost, close=lost)
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=lambda path: writer))
    log = run_with(tmp_path, "tensorboard")
    assert log.count("tracking ends here: ConnectionError: no network; the run goes on") == 1 and log.endswith("on\n")


def test_none_unknown_and_not_installed(monkeypatch):
    check_tracker("")
    with pytest.raises(GolfError, match="not one of tensorboard, wandb"):
        check_tracker("mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(GolfError, match=r"pip install 'golf-jax\[wandb\]'"):
        check_tracker("wandb")


def test_only_finite_numbers_are_sent():
    row = {"step": 1, "loss": 1.0, "bad": float("inf"), "flag": True, "text": "x", "none": None}
    assert scalars("validation", row) == {"validation/loss": 1.0}

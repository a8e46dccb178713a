"""A run directory as a report reads it, finished or not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from golf_jax.artifact.ledger import ByteLedger, ledger
from golf_jax.config import GolfError, Recipe, from_dict
from golf_jax.files import json_rows, read_bytes
from golf_jax.training.rundir import read_json, read_stages

STEP, VALIDATION = ("step", "seconds", "lr_factor", "loss", "momentum", "grad_norm"), ("step", "seconds", "val_loss", "val_bpb")
NULL = ("loss", "momentum", "grad_norm", "val_loss", "val_bpb")  # where there is none, or none that is finite


@dataclass(frozen=True)
class Record:
    """One run. What it does not hold yet is empty."""

    path: Path
    name: str
    recipe: Recipe
    config: dict[str, Any]
    """config.json: the recipe as it was asked for."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Rows of metrics.jsonl, one per training step: step, loss (nats per token), lr_factor, momentum, grad_norm, seconds."""
    validations: list[dict[str, Any]] = field(default_factory=list)
    """Validations during training: step, seconds, val_loss (nats per token), val_bpb."""
    stages: dict[str, Any] = field(default_factory=dict)
    """stages.json: what each finished stage says (train, pack, evaluations)."""
    ledger: ByteLedger | None = None
    """Bytes of the artifact, its code included; None before there is one."""

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Method -> score of the packed model, in the order in which they were made."""
        return self.stages.get("evaluations", {})


def is_run(path: Path) -> bool:
    return (path / "config.json").is_file()


def find_runs(paths: list[Path]) -> list[Path]:
    """The run directories among `paths` and directly inside those that are none. Raises GolfError for a path without a run."""
    found = []
    for path in paths:
        inside = [path] if is_run(path) else sorted(p.parent for p in path.glob("*/config.json"))
        if not inside:
            raise GolfError(f"{path}: no run is there (config.json is missing), nor in a folder directly inside")
        found += inside
    return list(dict.fromkeys(found))


def read_record(path: Path, name: str = "") -> Record:
    """The record of one run directory. Raises GolfError naming the file that is missing, damaged or not a run's."""
    try:
        config = read_json(path / "config.json")
    except FileNotFoundError:
        raise GolfError(f"{path}: no run is there (config.json is missing)") from None
    stages, rows = read_stages(path), json_rows(path / "metrics.jsonl")
    bytes_of = None
    if "pack" in stages and (path / "artifact.golf").is_file():
        try:
            bytes_of = ledger(read_bytes(path / "artifact.golf"), stages["pack"]["code_bytes"])
        except GolfError as error:
            raise GolfError(f"{path / 'artifact.golf'}: {error}; go on with the run to make it anew (--resume)") from None
    return Record(
        path,
        name or path.name,
        from_dict(Recipe, config, f"{path / 'config.json'}"),
        config,
        [row for row in rows if row["event"] == "train" and row.get("loss") is not None and _checked(path, row, STEP)],
        [row for row in rows if row["event"] == "validation" and _checked(path, row, VALIDATION)["val_bpb"] is not None],
        stages,
        bytes_of,
    )


def _checked(path: Path, row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The row, in which all `names` are numbers. Raises GolfError where one is not."""
    for name in names:
        value = row.get(name, ...)
        if not (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 or (value is None and name in NULL)):
            said = "missing" if value is ... else f"{str(value)[:40]!a}, no number"
            raise GolfError(f"{path / 'metrics.jsonl'}: {name} of step {str(row.get('step'))[:20]!a} is {said}; remove that line")
    return row


def read_records(paths: list[Path]) -> list[Record]:
    """The records of several runs, each under a name of its own: the folder's, with its parent's where two are the same."""
    names = [path.resolve().name for path in paths]
    shown = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    return [read_record(path, name) for path, name in zip(paths, shown, strict=True)]

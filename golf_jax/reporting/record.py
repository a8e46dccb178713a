"""A run directory as a report reads it, finished or not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from golf_jax.artifact.ledger import ByteLedger, ledger
from golf_jax.config import GolfError, Recipe, to_dict
from golf_jax.files import read_bytes
from golf_jax.training.runfiles import Evaluation, Stages, Step, Validation, read_config, read_metrics, read_stages


@dataclass(frozen=True)
class Record:
    """One run. What it does not hold yet is empty."""

    path: Path
    name: str
    recipe: Recipe
    config: dict[str, Any]
    """config.json: the recipe as it was asked for."""
    steps: list[Step] = field(default_factory=list)
    """Rows of metrics.jsonl, one per training step: step, loss (nats per token), lr_factor, momentum, grad_norm, seconds."""
    validations: list[Validation] = field(default_factory=list)
    """Validations during training: step, seconds, val_loss (nats per token), val_bpb."""
    stages: Stages = field(default_factory=lambda: Stages())
    """stages.json: what each finished stage says (train, pack, evaluations)."""
    ledger: ByteLedger | None = None
    """Bytes of the artifact, its code included; None before there is one."""

    @property
    def evaluations(self) -> dict[str, Evaluation]:
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
    recipe, stages, (steps, validations) = read_config(path), read_stages(path), read_metrics(path)
    bytes_of = None
    if "pack" in stages and (path / "artifact.golf").is_file():
        try:
            bytes_of = ledger(read_bytes(path / "artifact.golf"), stages["pack"]["code_bytes"])
        except GolfError as error:
            raise GolfError(f"{path / 'artifact.golf'}: {error}; go on with the run to make it anew (--resume)") from None
    return Record(path, name or path.name, recipe, to_dict(recipe), steps, validations, stages, bytes_of)


def read_records(paths: list[Path]) -> list[Record]:
    """The records of several runs, each under a name of its own: the folder's, with its parent's where two are the same."""
    names = [path.resolve().name for path in paths]
    shown = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    return [read_record(path, name) for path, name in zip(paths, shown, strict=True)]

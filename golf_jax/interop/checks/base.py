"""What every check of `golf_jax.reproduce` is made of: reference files, comparisons with tolerances, results."""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from golf_jax.config import GolfError, ModelConfig
from golf_jax.interop.hparams import RECIPES, read_config
from golf_jax.interop.torch_names import from_torch

Measure = Literal["abs", "of max", "rel L2", "rel", "equal"]


def compiler_options() -> dict[str, Any]:
    """On a CPU the unrolled small models of the references take far longer to optimise than to run."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


@dataclass(frozen=True)
class CheckResult:
    """One row of the table."""

    name: str
    compared: int
    """Tensors (or numbers) compared."""
    max_abs: float
    max_rel: float
    """Largest relative error in the check's own measure (`abs`, `equal`: of the tensor's maximum)."""
    tolerance: float
    measure: Measure
    """What the tolerance limits: the absolute error, the error relative to the tensor's maximum, its relative L2 norm, every element's
    relative error, or (`equal`) the fraction of unequal elements."""
    ok: bool
    worst: str = ""
    """The tensor with the largest error, or what failed."""


class Comparison:
    """Collects pairs (ours, reference) under one tolerance.

        c = Comparison("grads", 1e-3, "rel L2"); c.add("grad/tok_emb.weight", ours, reference); return [c.result()]

    A reference that is zero throughout is compared absolutely. NaN, infinity and a wrong shape fail.
    """

    def __init__(self, name: str, tolerance: float, measure: Measure):
        self.name, self.tolerance = name, tolerance
        self.measure: Measure = measure
        self.compared, self._max_abs, self._max_rel, self._error, self._worst = 0, 0.0, 0.0, -1.0, ""

    def add(self, key: str, ours: Any, reference: Any) -> None:
        ours, reference = np.asarray(ours), np.asarray(reference)
        self.compared += 1
        if ours.shape != reference.shape:
            return self.fail(f"{key}: shape {ours.shape}, reference {reference.shape}")
        a, b = ours.astype(np.float64), reference.astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return self.fail(f"{key}: not finite")
        if a.size == 0:
            return
        absolute = float(np.abs(a - b).max())
        error, relative = self._errors(a, b, absolute)
        self._max_abs, self._max_rel = max(self._max_abs, absolute), max(self._max_rel, relative)
        if error > self._error:
            self._error, self._worst = error, key

    def _errors(self, a: np.ndarray, b: np.ndarray, absolute: float) -> tuple[float, float]:
        """(what the tolerance limits, the relative error shown)."""
        scale = float(np.abs(b).max())
        of_max = absolute / scale if scale else absolute
        if self.measure == "abs":
            return absolute, of_max
        if self.measure == "of max":
            return of_max, of_max
        if self.measure == "equal":
            return float((a != b).mean()), of_max
        if self.measure == "rel":
            worst = float((np.abs(a - b) / np.where(b == 0, 1, np.abs(b))).max())
            return worst, worst
        norm = float(np.linalg.norm(b))
        l2 = float(np.linalg.norm(a - b)) / (norm or 1.0)
        return l2, l2

    def fail(self, why: str) -> None:
        """The check misses for a reason that is not a number."""
        if self._error != np.inf:
            self._error, self._worst = np.inf, why

    def result(self) -> CheckResult:
        ok = self.compared > 0 and self._error <= self.tolerance
        worst = self._worst or ("" if self.compared else "nothing to compare")
        return CheckResult(self.name, self.compared, self._max_abs, self._max_rel, self.tolerance, self.measure, ok, worst)


class Reference(Mapping[str, np.ndarray]):
    """One reference file: arrays by key, nothing pickled. Raises GolfError naming the file where it is damaged."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = np.load(path, allow_pickle=False)
            self._keys = list(self._file.files)
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as e:
            raise GolfError(f"{path}: not a readable npz file ({str(e).splitlines()[0] if str(e) else type(e).__name__})") from None
        self._arrays: dict[str, np.ndarray] = {}

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._arrays:
            if key not in self._keys:
                raise GolfError(f"{self.path}: no entry {key!r}")
            try:
                self._arrays[key] = self._file[key]
            except Exception as e:  # zip and npy damage raise half a dozen types
                raise GolfError(f"{self.path}: entry {key!r} is damaged ({type(e).__name__})") from None
        return self._arrays[key]

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self):
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Entries whose key starts with `prefix`, without it."""
        return {key[len(prefix) :]: self[key] for key in self._keys if key.startswith(prefix)}

    def first(self, *keys: str) -> np.ndarray | None:
        """The first of several spellings that is there."""
        return next((self[key] for key in keys if key in self), None)

    def config(self) -> dict[str, Any]:
        return read_config(self["config"], str(self.path)) if "config" in self else {}


@dataclass
class Model:
    """A reference model in our terms."""

    config: ModelConfig
    params: dict[str, np.ndarray]
    settings: dict[str, Any]
    """The PR's hyperparameters as stored beside the parameters."""


@dataclass
class Context:
    """The reference files of one directory (golden layout), or one self-contained file (portable layout)."""

    recipe: str
    path: Path
    devices: int = 1
    _files: dict[str, Reference] = field(default_factory=dict)
    _models: dict[str, Model] = field(default_factory=dict)
    cache: dict[Any, Any] = field(default_factory=dict)
    """Compiled functions and results that several checks share."""
    not_checked: dict[str, str] = field(default_factory=dict)
    """What could not be compared on this machine, and why."""

    @property
    def portable(self) -> bool:
        return self.path.is_file()

    def has(self, name: str) -> bool:
        return not self.portable and (self.path / f"{name}.npz").is_file()

    def file(self, name: str) -> Reference:
        if name not in self._files:
            self._files[name] = Reference(self.path if self.portable else self.path / f"{name}.npz")
        return self._files[name]

    def model(self, name: str = "model") -> Model:
        """The model whose parameters NAME.npz (or the portable file) holds."""
        if name not in self._models:
            z = self.file(name)
            settings = z.config()
            config, params = from_torch(self.recipe, settings, z.under("param/"))
            self._models[name] = Model(config, params, settings)
        return self._models[name]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


def detect(path: Path) -> str:
    """The recipe of a reference directory or file: by its name, else by what the settings name.

    Raises GolfError when neither tells.
    """
    if not path.exists():
        raise GolfError(f"{path}: no such file or directory")
    for part in (path.resolve().stem, path.resolve().parent.name):
        for recipe in sorted(RECIPES, key=len, reverse=True):
            if recipe in part.lower().replace("_", "").replace("-", ""):
                return recipe
    files = [path] if path.is_file() else sorted(path.glob("*.npz"))
    if not files:
        raise GolfError(f"{path}: holds no npz file; give a directory of reference tensors or one portable npz file")
    for file in files:
        settings = {k.lower(): v for k, v in Reference(file).config().items()}
        if f"pr{settings.get('pr')}" in RECIPES:
            return f"pr{settings['pr']}"
        for recipe, mark in _MARKS.items():
            if mark in settings:
                return recipe
    raise GolfError(f"{path}: which pull request? name the directory after it ({', '.join(RECIPES)})")


_MARKS = {
    "pr372": "late_k_fp16_layers",
    "pr562": "swa_start_frac",
    "pr638": "xsa_layers",
    "pr1182": "trigram_vocab_size",
    "pr2005": "num_loops",
}

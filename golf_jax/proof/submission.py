"""The submission folder, from what finished runs measured: README.md, submission.json, logs, requirements.txt, train_gpt.py.

train_gpt.py is the runs' code.pyz, byte for byte: the code that ran, that was counted, and that Python runs as it is.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from golf_jax.config import CAP_BYTES, GolfError, Recipe, to_dict
from golf_jax.files import read_bytes, write_atomic
from golf_jax.options import Author
from golf_jax.progress import clock_seconds
from golf_jax.proof.finding import Finding, table
from golf_jax.training.resume import stored_recipe
from golf_jax.training.rundir import go_on
from golf_jax.training.runfiles import MAX_BYTES, Result, read_environment, read_result

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece", "zstandard", "brotli", "tyro")
CONTRADICTED = ("claims", "round trip")  # a failure of these says: the numbers are not those of this artifact
RECORD_NEEDS = ("implied bytes", "hardware")  # a warning of these says: another text, another machine


@dataclass(frozen=True)
class Finished:
    """A finished run: its recipe, result.json, and of environment.json the devices it used and the versions of its packages."""

    path: Path
    recipe: Recipe
    result: Result
    devices: list[str]
    packages: dict[str, str | None]

    @classmethod
    def read(cls, path: Path) -> "Finished":
        """Raises GolfError if the run in `path` has not finished, or does not say where it ran."""
        recipe, file = stored_recipe(path), path / "environment.json"
        try:
            result, environment = read_result(path), read_environment(path)
        except FileNotFoundError:
            raise GolfError(f"{path}: the run has not finished; go on with it: {go_on(path)}") from None
        used, packages = (environment or {}).get("devices_used"), (environment or {}).get("packages", {})
        if environment is None or not used or not packages.get("jax"):
            what = "devices_used or packages.jax is" if environment else "it is"
            raise GolfError(f"{file}: {what} missing, and a submission says where it ran; put back what the run wrote")
        return cls(path, recipe, result, environment["devices"][:used], packages)

    @property
    def legal(self) -> dict[str, float]:
        """Bits per byte by evaluation, of those that are legal and whole."""
        legal = {name: e["val_bpb"] for name, e in self.result["evaluations"].items() if e["legal"] and not e["partial"]}
        if not legal:
            raise GolfError(f"{self.path}: no evaluation of it is legal; score it with another method: --resume {self.path} --eval...")
        return legal

    def row(self, method: str) -> dict[str, Any]:
        """The entry of `seed_results`."""
        e, r = self.result["evaluations"][method], self.result
        return {
            "val_loss": e["val_loss"],
            "val_bpb": e["val_bpb"],
            "artifact_bytes": r["total_bytes"],  # with code, as the records have it
            "model_bytes": r["artifact_bytes"],
            "steps": r["steps"],
            "step_avg_ms": 1000 * r["train_seconds"] / max(r["steps"], 1),
            "train_time_s": r["train_seconds"],
            "eval_time_s": clock_seconds(e["seconds"]),
        }


def method_of(runs: Sequence[Finished]) -> str:
    """The evaluation that counts: the best, on the mean, of those that are legal in every run."""
    shared = [name for name in runs[0].legal if all(name in run.legal for run in runs)]
    if not shared:
        raise GolfError(f"no evaluation is legal in all of {', '.join(str(run.path) for run in runs)}; score them by the same methods")
    return min(shared, key=lambda name: statistics.fmean(run.legal[name] for run in runs))


def obstacles(findings: Sequence[Finding], record: bool) -> list[Finding]:
    """What forbids a submission: to the record track whatever fails; to the other, that a run's files contradict each other."""
    return [
        f
        for f in findings
        if (f.status == "fail" and (record or f.rule in CONTRADICTED)) or (record and f.status == "warning" and f.rule in RECORD_NEEDS)
    ]


def claims(runs: Sequence[Finished], findings: Sequence[Finding], about: Author, record: bool, date: str) -> dict[str, Any]:
    """submission.json, with the fields of accepted records. Numbers are means over the runs, bytes their maximum."""
    method, first = method_of(runs), runs[0].result
    rows = {str(run.recipe.seed): run.row(method) for run in runs}

    def mean(field: str) -> float:
        return statistics.fmean(row[field] for row in rows.values())

    def std(field: str) -> float:
        return statistics.stdev(row[field] for row in rows.values()) if len(rows) > 1 else 0.0

    def holds(*rules: str) -> bool:
        found = [f.status for f in findings if f.rule in rules]
        return "pass" in found and "fail" not in found and "not checkable" not in found

    devices = runs[0].devices
    return {
        "author": about.author,
        "github_id": about.github_id,
        "name": about.name or first["recipe"],
        "blurb": about.blurb,
        "date": date,
        "track": "10min_16mb" if record else "non_record_16mb",
        "val_loss": mean("val_loss"),
        "val_bpb": mean("val_bpb"),
        "val_loss_std": std("val_loss"),
        "val_bpb_std": std("val_bpb"),
        "evaluation": method,
        "seeds": [run.recipe.seed for run in runs],
        "seed_results": rows,
        "bytes_total": max(run.result["total_bytes"] for run in runs),
        "bytes_code": first["code_bytes"],
        "artifact_bytes_mean": mean("artifact_bytes"),
        "artifact_bytes_max": max(row["artifact_bytes"] for row in rows.values()),
        "train_steps_mean": mean("steps"),
        "step_avg_ms_mean": mean("step_avg_ms"),
        "hardware": f"{len(devices)} x {devices[0]}",
        "framework": "jax",
        "jax_version": runs[0].packages["jax"],
        "compliance": {
            "train_under_600s": holds("training clock", "Hessian clock"),
            "eval_under_600s": holds("evaluation clock"),
            "artifact_under_16mb": holds("bytes"),
            "score_first_ttt": holds("C3"),
            "three_seeds": len(rows) >= 3 and holds("seeds"),
        },
    }


def readme(facts: dict[str, Any], report: str, embedded: bool) -> str:
    """README.md: results, how to run it, and the checks as they came out. embedded: the text is the one that every Python carries."""
    lines = ["| seed | val_bpb | val_loss | steps | training | evaluation | artifact |", "|---|---|---|---|---|---|---|"]
    for seed, r in facts["seed_results"].items():
        score, times = f"{r['val_bpb']:.8f} | {r['val_loss']:.8f} | {r['steps']:,}", f"{r['train_time_s']:.1f} s | {r['eval_time_s']:.1f} s"
        lines.append(f"| {seed} | {score} | {times} | {r['artifact_bytes']:,} bytes |")
    lines.append(f"| mean | {facts['val_bpb']:.8f} +- {facts['val_bpb_std']:.8f} | {facts['val_loss']:.8f} | | | | |")
    seed = facts["seeds"][0]
    flags = "" if embedded else " --data.train 'DATA/*_train_*.bin' --data.val 'DATA/*_val_*.bin'"
    where = "" if embedded else ", with the challenge's shards in DATA"
    return f"""# {facts["name"]}

{facts["blurb"]}

{chr(10).join(lines)}

Score: {facts["evaluation"]}. On {facts["hardware"]}, JAX {facts["jax_version"]}. Artifacts are counted with the code
({facts["bytes_code"]:,} bytes): at most {facts["bytes_total"]:,} of {CAP_BYTES:,} bytes.

## Run it
In this folder{where}:

```
pip install -r requirements.txt
python train_gpt.py recipe.json --seed {seed}{flags}
python train_gpt.py recipe.json --score artifact_seed{seed}.golf{flags}
```

train_gpt.py is the program that ran, byte for byte, as a Python zip application; its first lines say how to read the sources.

## Checks
```
{report.rstrip()}
```
"""


def requirements(packages: dict[str, str | None], devices: Sequence[str]) -> str:
    """requirements.txt: the libraries that the run used, at its versions."""
    pins = [f"{name}=={packages[name]}" for name in LIBRARIES if packages.get(name)]
    extra = "[cuda13]" if any("NVIDIA" in d for d in devices) else "[tpu]" if any("TPU" in d for d in devices) else ""
    return "\n".join(pin.replace("jax==", f"jax{extra}==") for pin in pins) + "\n"


def write_submission(
    runs: Sequence[Finished], report: dict[str, list[Finding]], about: Author, record: bool, folder: Path, date: str
) -> dict[str, Any]:
    """Write the folder; returns submission.json. Raises GolfError where the runs are not one submission."""
    if folder.exists() and any(folder.iterdir()):
        raise GolfError(f"{folder}: is not empty; give another --out")
    codes = {read_bytes(run.path / "code.pyz", MAX_BYTES) for run in runs}
    if len(codes) > 1:
        raise GolfError("the runs did not run the same code (code.pyz differs); submit runs of one program")
    findings = [f for found in report.values() for f in found]
    facts = claims(runs, findings, about, record, date)
    needed = requirements(runs[0].packages, runs[0].devices)
    data = runs[0].recipe.data
    if data.train != "embedded":  # where the shards lay is nobody's concern, and their reader's to say
        data = replace(data, train=Path(data.train).name, val=Path(data.val).name, tokenizer="tokenizer.model")
    files: dict[str, bytes | str] = {
        "train_gpt.py": codes.pop(),
        "recipe.json": json.dumps(to_dict(replace(runs[0].recipe, data=data)), indent=1) + "\n",
        "tokenizer.model": read_bytes(runs[0].path / "tokenizer.model", MAX_BYTES),
        "requirements.txt": needed,
        "submission.json": json.dumps(facts, indent=1, allow_nan=False) + "\n",
        "README.md": readme(
            facts, "\n".join(table(Path(path).name, findings) for path, findings in report.items()), data.train == "embedded"
        ),
    }
    for run in runs:
        files[f"train_seed{run.recipe.seed}.log"] = read_bytes(run.path / "log.txt")
        files[f"artifact_seed{run.recipe.seed}.golf"] = read_bytes(run.path / "artifact.golf", MAX_BYTES)
    try:
        for name, content in files.items():
            write_atomic(folder / name, content)
    except GolfError:  # half a submission would have to be removed before the next
        for name in files:
            (folder / name).unlink(missing_ok=True)
        raise
    return facts

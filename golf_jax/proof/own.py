"""A run directory of this project: nothing is taken on trust that its files can show again."""

import hashlib
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from golf_jax.artifact.code import raw_code_bytes, unbundle
from golf_jax.artifact.container import MAX_FILE_BYTES, inspect
from golf_jax.config import CAP_BYTES, LIMIT_SECONDS, GolfError, Recipe, to_dict
from golf_jax.data.corpus import build_embedded
from golf_jax.data.manifest import sha256_file
from golf_jax.data.shards import find_shards
from golf_jax.data.verify import OFFICIAL_BYTES, verify
from golf_jax.evaluation.score import NORMALIZED
from golf_jax.files import read_bytes
from golf_jax.processes import cache_directory
from golf_jax.progress import clock_seconds
from golf_jax.proof.finding import Finding, fold
from golf_jax.proof.folder import check_settings, customary
from golf_jax.proof.logs import Run, parse_log, read_text
from golf_jax.training.runfiles import Environment, Result, read_config, read_environment, read_json, read_result

READ_AT_MOST = 1 << 29  # bytes of shards that are read again here; more is left to `golf_jax.data verify`
SCORE_AT_MOST = 300.0  # recorded seconds of an evaluation that is done again here
SAME = 1e-5  # relative difference of nats between two scorings of one artifact: other batches, other order of sums


def is_run(path: Path) -> bool:
    return (path / "config.json").is_file() and ((path / "log.txt").is_file() or (path / "result.json").is_file())


def read_run(path: Path) -> Run | None:
    """The run as its log tells it, with the settings of config.json; None where the log has no score and no step."""
    runs = parse_log(read_text(path / "log.txt"), f"{path.name}/log.txt") if (path / "log.txt").is_file() else []
    if not runs:
        return None
    run = runs[-1]  # a resumed run writes on in the same log
    run.settings = {name: (value, 1) for name, value in _flat(to_dict(read_config(path)))}
    return run


def check_own(path: Path, rerun: bool = True) -> list[Finding]:
    """All checks of one run directory. rerun: score the artifact again in a fresh process. Raises GolfError for unreadable files."""
    recipe = read_config(path)
    if not (path / "result.json").is_file():
        return [Finding("not checkable", "input", "no result.json: the run has not finished; go on with --resume", str(path))]
    result, environment = read_result(path), read_environment(path)
    found = [*_scores(result), *_bytes(path, result), *_clocks(result, environment), *_data(path, result, recipe)]
    found += [*_legality(result), *_log(path, result)]
    found.append(_round_trip(path, result, recipe) if rerun else Finding("not checkable", "round trip", "left out by --no-rerun"))
    return fold(found)


def check_together(paths: list[Path]) -> list[Finding]:
    """Several run directories as one submission: distinct seeds, the same settings."""
    runs = [run for path in paths if (run := read_run(path))]
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        first = Finding("fail", "seeds", f"runs with the same seed: {', '.join(map(str, seeds))}")
    else:
        first = customary(seeds)
    return [first, *check_settings(runs)]


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [pair for key, inner in items for pair in _flat(inner, f"{name}.{key}" if name else str(key))]
    return [(name, str(value))]


def _scores(result: Result) -> list[Finding]:
    found = []
    for name, e in result["evaluations"].items():
        text = f"{e['bytes']:,} bytes ({e['tokens']:,} tokens, {e['bytes'] / max(e['tokens'], 1):.4f} bytes per token, {name})"
        where = f"result.json: evaluations.{name}"
        sound = math.isclose(e["val_loss"] * e["tokens"], e["nll_nats"], rel_tol=1e-9)
        sound &= math.isclose(e["val_bpb"] * e["bytes"] * math.log(2), e["nll_nats"], rel_tol=1e-9)
        if not sound:
            found.append(Finding("fail", "implied bytes", f"{text}: nats, tokens and bytes do not give the score", where))
        elif e["bytes"] == OFFICIAL_BYTES:
            found.append(Finding("pass", "implied bytes", text, where))
        else:
            found.append(Finding("warning", "implied bytes", f"{text}: not the official validation set", where))
        facts = e["facts"]
        covered = f"{facts['covered']:,} of {facts['targets']:,} targets, {name}"
        missing = facts["targets"] - facts["covered"]
        cut = missing > facts["targets"] // 1_000 or e["partial"]  # less is what the window lists of some recipes leave out
        found.append(Finding("fail" if cut else "warning" if missing else "pass", "coverage", covered, where))
    return found


def _bytes(path: Path, result: Result) -> list[Finding]:
    found, artifact, code = [], path / "artifact.golf", path / "code.pyz"
    if not artifact.is_file():
        return [Finding("fail", "bytes", "artifact.golf is missing", str(path))]
    try:
        data = read_bytes(artifact, MAX_FILE_BYTES)
    except GolfError as error:
        return [Finding("fail", "bytes", str(error), "artifact.golf")]
    code_bytes = code.stat().st_size if code.is_file() else result["code_bytes"]
    measured = "measured" if code.is_file() else "recorded"
    total = len(data) + code_bytes
    text = f"{total:,} bytes = {len(data):,} model + {code_bytes:,} code ({measured}), {abs(CAP_BYTES - total):,}"
    text += " below the cap" if total <= CAP_BYTES else " over the cap"
    found.append(Finding("pass" if total <= CAP_BYTES else "fail", "bytes", text, "artifact.golf"))
    if (len(data), total) != (result["artifact_bytes"], result["total_bytes"]):
        said = f"{result['artifact_bytes']:,} model, {result['total_bytes']:,} in all"
        text = f"result.json says {said}; the files have {len(data):,}, {total:,}"
        found.append(Finding("fail", "claims", text, "result.json"))
    try:
        inspect(data)
        sound = result.get("sha256") in (None, hashlib.sha256(data).hexdigest())
        text = "artifact.golf is whole" if sound else "artifact.golf is another file than the run packed"
        found.append(Finding("pass" if sound else "fail", "claims", text, "artifact.golf"))
    except GolfError as error:
        found.append(Finding("fail", "claims", f"artifact.golf: {error}", "artifact.golf"))
    if not code.is_file():
        return [*found, Finding("not checkable", "code", "no code.pyz in the run directory", str(path))]
    try:
        packed = read_bytes(code, MAX_FILE_BYTES)
        raw, files = raw_code_bytes(packed), len(unbundle(packed))
        same = raw == result["code_bytes_raw"]
        text = f"code.pyz holds {files} files, {raw:,} bytes of source" + ("" if same else f"; the run had {result['code_bytes_raw']:,}")
        return [*found, Finding("pass" if same else "fail", "code", text, "code.pyz")]
    except GolfError as error:
        return [*found, Finding("fail", "code", f"code.pyz: {error}", "code.pyz")]


def _clocks(result: Result, environment: Environment | None) -> list[Finding]:
    devices = environment["devices"] if environment else []
    official = len(devices) == 8 and all("H100" in d for d in devices)
    here = f"{len(devices)} x {devices[0]}" if devices else "an unknown machine"
    step = result["train_seconds"] / max(result["steps"], 1)
    evaluation = sum(clock_seconds(e["seconds"]) for e in result["evaluations"].values())
    times = [("training clock", "training ended at", result["train_seconds"], max(step, 0.5))]
    if result["train_and_calibration_seconds"] > result["train_seconds"]:
        times.append(("Hessian clock", "training data were read until", result["train_and_calibration_seconds"], 0.0))
    times.append(("evaluation clock", f"{len(result['evaluations'])} evaluations took", evaluation, 0.0))
    found = [] if official else [Finding("warning", "hardware", f"the times are those of {here}", "environment.json")]
    for rule, text, seconds, grace in times:
        late = seconds > LIMIT_SECONDS + grace
        found.append(Finding("pass" if not late else "fail" if official else "warning", rule, f"{text} {seconds:.1f} s", "result.json"))
    return found


def _data(path: Path, result: Result, recipe: Recipe) -> list[Finding]:
    found = []
    if (path / "tokenizer.model").is_file():
        same = sha256_file(path / "tokenizer.model") == result["tokenizer_sha256"]
        text = "tokenizer.model is the one the run used" if same else "tokenizer.model is not the one the run used"
        found.append(
            Finding("pass" if same else "fail", "data", f"{text} (sha256 {result['tokenizer_sha256'][:12]}...)", "tokenizer.model")
        )
    train, val, tokenizer = _text(recipe)
    try:
        size = sum(p.stat().st_size for pattern in (train, val) for p in find_shards(pattern))
        if size > READ_AT_MOST:
            text = f"{size / 2**30:.1f} GiB of shards; look with python -m golf_jax.data verify"
            return [*found, Finding("not checkable", "data", text)]
        report = verify(train, val, tokenizer)
    except (GolfError, OSError) as error:
        return [*found, Finding("not checkable", "data", f"the shards cannot be read again: {error}")]
    if report.problems:
        return [*found, *(Finding("fail", "data", problem) for problem in report.problems)]
    sound = "; ".join(fact for fact in report.facts if fact.startswith(("train:", "val:", "overlap")))
    doubts = [fact.removeprefix("WARNING: ") for fact in report.facts if fact.startswith("WARNING: ")]
    return [*found, Finding("pass", "data", sound), *(Finding("warning", "data", doubt) for doubt in doubts)]


def _text(recipe: Recipe) -> tuple[str, str, str]:
    """(training shards, validation shards, tokenizer) of a run."""
    data = recipe.data
    if data.train != "embedded":
        return data.train, data.val, data.tokenizer
    directory = Path(build_embedded(cache_directory(), recipe.model.vocab_size)["directory"])
    return str(directory / "train_*.bin"), str(directory / "val_*.bin"), str(directory / "tokenizer.model")


def _legality(result: Result) -> list[Finding]:
    found = []
    for name, e in result["evaluations"].items():
        f, where = e["facts"], f"result.json: evaluations.{name}"
        causal, error = f["causal"], f["normalization_error"]
        if causal is None:
            found.append(Finding("not checkable", "C1", f"{name}: not measured", where))
        else:
            text = "earlier distributions are bit-equal after a flip" if causal else "a flipped token changes earlier distributions"
            found.append(Finding("pass" if causal else "fail", "C1", text, where))
        if error is None:
            found.append(Finding("not checkable", "C2", f"{name}: not measured", where))
        else:
            found.append(Finding("pass" if error <= NORMALIZED else "fail", "C2", f"|logsumexp(log p)| <= {error:.1e}", where))
        late = f["order_violations"]
        text = f"{name}: {f['updates']} updates, {late} targets trained on before they were scored"
        found.append(Finding("fail" if late else "pass", "C3", text, where))
        text = f"{name}: {f['covered']:,} of {f['targets']:,} targets scored, {f['duplicates']} scores repeated"
        found.append(Finding("pass" if f["exactly_once"] else "warning", "C4", text, where))
    return found


def _log(path: Path, result: Result) -> list[Finding]:
    """Does log.txt end with the scores of result.json?"""
    run = read_run(path)
    if run is None or not run.finals:
        return [Finding("not checkable", "claims", "log.txt has no final score", str(path))]
    logged = {f"{s.bpb.value:.8f}": s for s in run.finals}
    found = []
    for name, e in result["evaluations"].items():
        score = logged.get(f"{e['val_bpb']:.8f}")
        text = f"{name} {e['val_bpb']:.8f}" + (" is in the log" if score else " is not in the log")
        found.append(Finding("pass" if score else "fail", "claims", text, run.at(score.line) if score else run.file))
    return found


def _round_trip(path: Path, result: Result, recipe: Recipe) -> Finding:
    """Score artifact.golf in a process that knows nothing of the run, the cheapest of its evaluations, and compare."""
    took = {name: clock_seconds(e["seconds"]) for name, e in result["evaluations"].items()}
    name = min(took, key=lambda n: took[n])
    _, val, tokenizer = _text(recipe)
    command = [sys.executable, "-m", "golf_jax.evaluate", str(path / "artifact.golf"), "--val", val, "--tokenizer", tokenizer]
    if took[name] > SCORE_AT_MOST:
        return Finding("not checkable", "round trip", f"takes about {took[name]:.0f} s: {' '.join(command[1:])} --mode {name}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "score.json"
        done = subprocess.run([*command, "--mode", name, "--json", str(out)], capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not out.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return Finding("fail", "round trip", f"the artifact cannot be scored again: {last}", "artifact.golf")
        again = read_json(out)
    before = result["evaluations"][name]
    text = f"{name} {again['val_bpb']:.8f} in a fresh process, {before['val_bpb']:.8f} in the run"
    same = math.isclose(again["nll_nats"], before["nll_nats"], rel_tol=SAME) and again["bytes"] == before["bytes"]
    return Finding("pass" if same else "fail", "round trip", text, "artifact.golf")

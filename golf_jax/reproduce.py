"""Does this implementation compute what a PyTorch script computed? A reference set in, a table of errors out.

    python -m golf_jax.reproduce SET [--json FILE] [--only model,train]
    python -m golf_jax.reproduce --check-format SET
    python -m golf_jax.reproduce --log train_seed42.log --artifact final_model.int6.ptz --recipe pr1182 --val GLOB --tokenizer MODEL

SET: a directory with reference.json and npz files, or one portable npz file (docs/reference-format.md), of any recipe or recipe file,
with any of the format's sections. The set brings its tolerances. What cannot be computed here is named as not checked.
--log: the artifact is scored in every way that the log has scores for, and compared with the log value by value.
Exit status 0: all within tolerance; 1: a miss, or a set that does not conform; 2: bad input, told in one line.
"""

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from golf_jax import cli
from golf_jax.config import GolfError
from golf_jax.files import check_target, json_text, write_atomic
from golf_jax.progress import to_screen


@dataclass(frozen=True)
class Arguments:
    """See the module."""

    path: Annotated[Path | None, tyro.conf.Positional] = None
    """A reference set: a directory, or one portable npz file."""
    check_format: bool = False
    """Only say whether the set conforms to the format."""
    json: Path | None = None
    """Write the results here as JSON."""
    only: str = ""
    """Only these sections, separated by commas."""
    devices: int = 1
    """Devices for training and evaluation: the results do not depend on it."""
    log: Path | None = None
    """Instead of a set: the log of one run."""
    artifact: str = ""
    """The packed model (or checkpoint) of the log: .ptz, .pt, .safetensors, artifact.golf, or a run directory."""
    recipe: str = ""
    """The recipe of a PyTorch file, or a recipe file (default: told by the names and shapes of its tensors)."""
    val: str = ""
    """Glob of the validation shards that the log's scores are of (default: those of the run that the artifact lies in)."""
    tokenizer: str = ""
    """SentencePiece model: of the shards (default: the one beside the artifact), or of a set whose units are texts."""
    max_docs: int = 0
    """With a log: only the first N documents. The scores are printed and compared with nothing (0: all)."""


@dataclass(frozen=True)
class Report:
    """What came out of a set."""

    recipe: str
    results: list
    """golf_jax.interop.checks.CheckResult, row by row."""
    not_checked: dict[str, str]
    """What could not be compared here, and why."""
    compared: int
    """Arrays and facts of the set that were compared, ..."""
    held: int
    """... of this many that the sections hold beside what is given."""

    def to_dict(self) -> dict[str, Any]:
        facts = {"recipe": self.recipe, "compared": self.compared, "held": self.held, "not_checked": self.not_checked}
        return facts | {"checks": [dataclasses.asdict(r) | {"ok": r.ok} for r in self.results]}


def reproduce(path: Path, only: str = "", devices: int = 1, tokenizer: str = "") -> Report:
    """Every section of the set (or those in `only`) computed and compared; prints each row as it is there. Raises GolfError."""
    from golf_jax.interop.checks import CHECKS, Set, run

    if unknown := set(filter(None, only.split(","))) - set(CHECKS):
        raise GolfError(f"--only {', '.join(sorted(unknown))}: no such section; known: {', '.join(CHECKS)}")
    refs = Set(path, devices, tokenizer)
    names = [name for name in CHECKS if name in refs.json["sections"] and (not only or name in only.split(","))]
    if not names:
        raise GolfError(f"{path}: no section to check; it has {', '.join(refs.json['sections'])}")
    to_screen(f"{refs.json['recipe']}: {path}\n{'check':58} {'items':>7} {'max abs':>10} {'max rel':>10} {'tolerance':>18}  ok")
    results, begin = [], time.perf_counter()
    for name in names:
        for r in run(refs, name):
            results.append(r)
            tolerance = "equal" if r.measure == "equal" and not r.tolerance else f"{r.tolerance:.1e} {r.measure}"
            miss = "" if r.ok else f" <- {r.worst}"
            row = f"{r.name:58} {r.compared:7d} {r.max_abs:10.2e} {r.max_rel:10.2e} {tolerance:>18}"
            to_screen(f"{row}  {'ok' if r.ok else 'MISS'}{miss}")
    for name, why in refs.not_checked.items():
        to_screen(f"{name:58} not checked: {why}")
    missed, (compared, held) = sum(not r.ok for r in results), refs.counts(names)
    whole = f"{compared:,} of {held:,} arrays and facts of the set compared"
    outcome = f"{missed or 'none'} missed" if results else "nothing could be checked"
    to_screen(f"{len(results)} checks, {whole} in {time.perf_counter() - begin:.0f} s, {outcome}")
    return Report(refs.json["recipe"], results, refs.not_checked, compared, held)


def rescore(args: Arguments) -> dict[str, Any]:
    """The artifact scored as its log says, and what came out. Raises GolfError."""
    from golf_jax.evaluation.stream import first_documents
    from golf_jax.interop import open_model
    from golf_jax.opening import text_for
    from golf_jax.rescoring import read_run, rescore

    assert args.log is not None
    if not args.artifact:
        raise GolfError(f"--log {args.log}: give the packed model of that run: --artifact FILE")
    run = read_run(args.log)
    model = open_model(args.artifact, args.recipe, to_screen)
    text = text_for(model, args.val, args.tokenizer)
    to_screen(f"{args.artifact}: {args.log}\n{'value':58} {'log':>16} {'here':>16} {'off by':>9} {'at most':>9}  ok")
    begin, most = time.perf_counter(), 0
    if args.max_docs:
        most = first_documents(text.val_tokens, text.tokenizer.bos_id, args.max_docs)
    done = rescore(run, model, text, to_screen, max_targets=most, devices=args.devices)
    for name, why in done.not_checked.items():
        to_screen(f"{name:58} not checked: {why}")
    missed = sum(not row.ok for row in done.rows)
    to_screen(f"{len(done.rows)} values of the log compared in {time.perf_counter() - begin:.0f} s, {missed or 'none'} missed")
    rows = [dataclasses.asdict(row) | {"ok": row.ok} for row in done.rows]
    return {"log": str(args.log), "artifact": args.artifact, "sha256": model.sha256, "values": rows, "not_checked": done.not_checked}


def main(argv: list[str]) -> int:
    args = tyro.cli(Arguments, args=argv, prog="python -m golf_jax.reproduce", description=__doc__)
    if (args.path is None) == (args.log is None):
        raise GolfError("give a reference set, or --log LOG --artifact FILE: one of the two")
    from golf_jax.processes import split_cpu  # jax reads JAX_PLATFORMS when it is imported: not before the line at the end has set it

    split_cpu(args.devices, sequences=1)
    if args.check_format:
        from golf_jax.interop.conformity import problems

        if args.path is None:
            raise GolfError("--check-format: give a reference set; a log has no format")
        found = problems(args.path)
        print("\n".join([f"{args.path}: {f'{len(found)} problems' if found else 'conforms'}", *(f"  {line}" for line in found)]))
        return int(bool(found))
    if args.json:
        check_target(args.json)
    if args.path is None:
        document = rescore(args)
        ok = all(row["ok"] for row in document["values"])
    else:
        report = reproduce(args.path, args.only, args.devices, args.tokenizer)
        document, ok = report.to_dict(), bool(report.results) and all(r.ok for r in report.results)
    if args.json:
        write_atomic(args.json, json_text(document))
    return int(not ok)


if __name__ == "__main__":
    # The references are float32 on a CPU; on an accelerator matrix products would be rounded otherwise.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cli.run(main)

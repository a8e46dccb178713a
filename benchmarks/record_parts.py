"""What each part of PR 2135 does in a miniature: trained from documents by `golf_jax.sweep`, in bits per byte before quantization.

    python benchmarks/record_parts.py fineweb.jsonl --folder sweeps/record [--steps 80] [--seeds 42,0,314] [--only all,plain,...]

Builds the texts from the same documents (with `--transform caseops` and without, tokenizers trained on them; with --sp8192 FILE the
challenge's, too), trains every arm with every seed for the same number of steps of as many tokens, and writes FOLDER/parts.json and the
table. The text is compared at 8,192 pieces, the parts at 1,024, where a step is four times as cheap. p is that of a paired t-test over the
seeds against the arm's reference, two-sided, beyond the noise below 0.01 over the number of comparisons. The same command goes on where it
was interrupted; --only tabulates and runs some arms.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from step_time import cpu_name

from golf_jax.proof.statistics import LEVEL, paired_test

SMALL = (
    "--model.num-layers 4 --model.width 64 --model.num-heads 4 --model.num-kv-heads 2 --model.rope-dims 8 "
    "--model.loop-start 1 --model.loop-end 2 --model.loop-repeats 1 --model.two-lanes-from 3 --data.seq-len 128 --data.ranks 1 "
    "--schedule.ema-decay 0.95 --optim.groups.0.momentum-warmup-steps 40 --quant.gptq-batches 1 "
    "--eval.packed.rows 0 --eval.documents.rank 0 --eval.documents.tilt.order 0 --eval.every 0 --eval.batch-rows 32"
).split()
TEXTS = {"caseops": ["--transform", "caseops"], "plain": [], "parts": ["--transform", "caseops"], "sp8192": []}
PIECES = {"caseops": 8192, "plain": 8192, "parts": 1024, "sp8192": 8192}
ROWS = {8192: 4, 1024: 8}  # of 128 tokens a step
ARMS = {  # name -> (text, flags, what it is, its reference)
    "caseops": ("caseops", "", "CaseOps text, 8,192 pieces", ""),
    "plain": ("plain", "", "plain text, 8,192 pieces of its own", "caseops"),
    "all": ("parts", "", "CaseOps text, 1,024 pieces, all of the record's parts", ""),
    "stream": ("parts", "--data.order stream", "rows of 128 from a stream, attention over documents", "all"),
    "one-lane": ("parts", "--model.two-lanes-from -1", "one lane", "all"),
    "one-triple": ("parts", "--optim.groups.0.newton-schulz-coefficients 3.4445 -4.7750 2.0315", "one triple of coefficients", "all"),
    "no-gate": ("parts", "--model.head-gate off", "no head gate", "all"),
    "sp8192": ("sp8192", "", "plain text, the challenge's sp8192", "caseops"),
}


def build(documents: str, folder: Path, texts: set[str], sp8192: str) -> None:
    for text in sorted(texts):
        tokenizer = ["--tokenizer", sp8192] if text == "sp8192" else ["--vocab-size", str(PIECES[text])]
        more = [*tokenizer, "--val-every", "40", *TEXTS[text]]
        if not (folder / text).exists():
            subprocess.run([sys.executable, "-m", "golf_jax.data", "build", documents, "--out", str(folder / text), *more], check=True)


def sweep(folder: Path, arm: str, steps: int, seeds: str) -> None:
    text, flags, *_ = ARMS[arm]
    data = [f"--data.{split}={folder / text / split}_*.bin" for split in ("train", "val")]
    data += [f"--data.tokenizer={folder / text / 'tokenizer.model'}", f"--data.rows-per-rank={ROWS[PIECES[text]]}"]
    more = [f"--model.vocab-size={PIECES[text]}", f"--budget.steps={steps}", *flags.split()]
    where = ["--seeds", seeds, "--sweep-dir", str(folder / "runs" / arm)]
    subprocess.run([sys.executable, "-m", "golf_jax.sweep", "pr2135", *SMALL, *data, *more, *where], check=True)


def scores(folder: Path, arm: str) -> tuple[dict[int, float], dict[str, Any]]:
    """(bits per byte by seed, what else there is to say)."""
    found: dict[int, float] = {}
    facts: dict[str, Any] = {"nats": {}}
    for path in sorted((folder / "runs" / arm).glob("*/result.json")):
        result, config = json.loads(path.read_text()), json.loads(path.with_name("config.json").read_text())
        before = result["pre_quantization"]
        found[config["seed"]] = before["val_bpb"]
        commit = json.loads(path.with_name("environment.json").read_text())["git_commit"]
        facts["nats"][config["seed"]] = before["val_loss"]
        facts |= {"bytes": before["bytes"], "tokens": before["tokens"], "steps": result["steps"], "git": commit}
    return found, facts


def tabulate(folder: Path, arms: list[str], command: str) -> None:
    """Prints the table of what is there, and writes parts.json."""
    compared, rows = sum(bool(ARMS[arm][3]) for arm in arms), []
    print("| run | seeds | bits/byte | std | nats/token | bits/byte more than its reference | p |\n|---|---|---|---|---|---|---|")
    for arm in arms:
        (mine, facts), (_, _, what, reference) = scores(folder, arm), ARMS[arm]
        row = {"arm": arm, "reference": reference, "bpb": mine, **facts}
        shown = ["", ""]
        if reference:
            base = scores(folder, reference)[0]
            row["difference"] = statistics.fmean(mine[s] - base[s] for s in mine)
            test = paired_test(mine, base, margin=0.0)
            assert test, "two seeds at least"
            row["p"] = 2 * min(test.p, 1 - test.p)
            row["verdict"] = f"{'beyond' if row['p'] < LEVEL / compared else 'within'} the noise"
            shown = [f"{row['difference']:+.4f}", f"{row['p']:.2g}, {row['verdict']}"]
        rows.append(row)
        nats = statistics.fmean(facts["nats"].values())
        cells = [what, ", ".join(map(str, mine)), f"{statistics.fmean(mine.values()):.4f}", f"{statistics.stdev(mine.values()):.4f}"]
        print("| " + " | ".join([*cells, f"{nats:.4f}", *shown]) + " |")
    (folder / "parts.json").write_text(
        json.dumps({"command": command, "device": cpu_name(), "flags": SMALL, "arms": rows}, indent=1) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", help="jsonl or text files, as `golf_jax.data build` takes them")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sp8192", default="", help="the challenge's SentencePiece model of 8,192 pieces")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", default="42,0,314")
    parser.add_argument("--only", default="", help="arms; a reference before those that are compared with it")
    options = parser.parse_args()
    arms = options.only.split(",") if options.only else [a for a in ARMS if a != "sp8192" or options.sp8192]
    build(options.documents, options.folder, {ARMS[arm][0] for arm in arms}, options.sp8192)
    for arm in arms:
        sweep(options.folder, arm, options.steps, options.seeds)
    tabulate(options.folder, arms, f"python benchmarks/record_parts.py {' '.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()

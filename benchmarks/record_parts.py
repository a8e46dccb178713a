"""What each part of PR 2135 does in a miniature: trained from documents by `golf_jax.sweep`, in bits per byte before quantization.

    python benchmarks/record_parts.py fineweb.jsonl --folder sweeps/record [--steps 80] [--seeds 42,0,314] [--only all,plain,...]

Builds the texts (the same documents with `--transform caseops` and without, each with a tokenizer of its own of 8,192 pieces trained on
them, and, with --sp8192 FILE, with the challenge's), trains every arm with every seed for the same number of steps of as many tokens, and
writes FOLDER/parts.json and the table. p is that of a paired t-test over the seeds, two-sided, beyond the noise below 0.01 over the number
of comparisons. The same command goes on where it was interrupted.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from golf_jax.proof.statistics import LEVEL, paired_test

SMALL = (
    "--model.vocab-size 8192 --model.num-layers 4 --model.width 64 --model.num-heads 4 --model.num-kv-heads 2 --model.rope-dims 8 "
    "--model.loop-start 1 --model.loop-end 2 --model.loop-repeats 1 --model.two-lanes-from 3 --data.seq-len 128 --data.ranks 1 "
    "--data.rows-per-rank 4 --schedule.ema-decay 0.95 --optim.groups.0.momentum-warmup-steps 40 --quant.gptq-batches 1 "
    "--eval.packed.rows 0 --eval.documents.rank 0 --eval.documents.tilt.order 0 --eval.every 0 --eval.batch-rows 32"
).split()
ARMS = {  # name -> (text, flags, what it is)
    "all": ("caseops", "", "all of the record's parts"),
    "plain": ("plain", "", "plain text, its own 8,192 pieces"),
    "stream": ("caseops", "--data.order stream", "rows of 128 from a stream, attention over documents"),
    "one lane": ("caseops", "--model.two-lanes-from -1", "one lane"),
    "one triple": ("caseops", "--optim.groups.0.newton-schulz-coefficients 3.4445 -4.7750 2.0315", "one triple of coefficients, not five"),
    "no gate": ("caseops", "--model.head-gate off", "no head gate"),
    "sp8192": ("sp8192", "", "plain text, the challenge's sp8192"),
}


def build(documents: str, folder: Path, sp8192: str) -> None:
    ways = {"caseops": ["--vocab-size", "8192", "--transform", "caseops"], "plain": ["--vocab-size", "8192"]}
    for name, flags in (ways | ({"sp8192": ["--tokenizer", sp8192]} if sp8192 else {})).items():
        if not (folder / name).exists():
            subprocess.run(
                [sys.executable, "-m", "golf_jax.data", "build", documents, "--out", str(folder / name), "--val-every", "40", *flags],
                check=True,
            )


def sweep(folder: Path, arm: str, steps: int, seeds: str) -> None:
    text, flags, _ = ARMS[arm]
    data = [f"--data.{split}={folder / text / split}_*.bin" for split in ("train", "val")]
    more = [f"--data.tokenizer={folder / text / 'tokenizer.model'}", f"--budget.steps={steps}", *flags.split()]
    where = ["--seeds", seeds, "--sweep-dir", str(folder / arm.replace(" ", "-"))]
    subprocess.run([sys.executable, "-m", "golf_jax.sweep", "pr2135", *SMALL, *data, *more, *where], check=True)


def scores(folder: Path, arm: str) -> tuple[dict[int, float], dict[str, object]]:
    """(bits per byte by seed, what else there is to say)."""
    found, facts = {}, {}
    for path in sorted((folder / arm.replace(" ", "-")).glob("*/result.json")):
        result, config = json.loads(path.read_text()), json.loads(path.with_name("config.json").read_text())
        before = result["pre_quantization"]
        found[config["seed"]] = before["val_bpb"]
        commit = json.loads(path.with_name("environment.json").read_text())["git_commit"]
        facts = {"bytes": before["bytes"], "tokens": before["tokens"], "steps": result["steps"], "git": commit}
    return found, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", help="jsonl or text files, as `golf_jax.data build` takes them")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sp8192", default="", help="the challenge's SentencePiece model of 8,192 pieces")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", default="42,0,314")
    parser.add_argument("--only", default="", help="arms, the first is the reference")
    options = parser.parse_args()
    build(options.documents, options.folder, options.sp8192)
    arms = options.only.split(",") if options.only else [a for a in ARMS if a != "sp8192" or options.sp8192]
    for arm in arms:
        sweep(options.folder, arm, options.steps, options.seeds)
    base, rows = scores(options.folder, arms[0])[0], []
    print(f"| run | bits/byte, mean of {len(base)} | std | worse than the first by | p |\n|---|---|---|---|---|")
    for arm in arms:
        mine, facts = scores(options.folder, arm)
        difference = statistics.fmean(mine[s] - base[s] for s in base if s in mine)
        test = paired_test(mine, base, margin=0.0)
        p = 2 * min(test.p, 1 - test.p) if test else None
        verdict = "" if p is None else "beyond the noise" if p < LEVEL / (len(arms) - 1) else "within the noise"
        rows.append({"arm": arm, "bpb": mine, "difference": difference, "p": p, "verdict": verdict, **facts})
        spread = f"{statistics.stdev(mine.values()):.4f}" if len(mine) > 1 else ""
        shown = f"{p:.2g}, {verdict}" if p is not None else ""
        print(f"| {ARMS[arm][2]} | {statistics.fmean(mine.values()):.4f} | {spread} | {difference:+.4f} | {shown} |")
    command = f"python benchmarks/record_parts.py {' '.join(sys.argv[1:])}"
    (options.folder / "parts.json").write_text(json.dumps({"command": command, "flags": SMALL, "arms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Logs as training programs of the challenge write them, made up, with every figure a parameter."""

import json
import math
from pathlib import Path

BYTES, SP1024 = 151_080_891, 62_021_845
TOKENS = SP1024 - SP1024 % 2048
SCRIPT = "\n".join(
    [
        "import os",
        "import torch",
        "class GPT:",
        "    def forward(self, x):",
        "        return x",
        "def main():",
        "    print('val_loss:1.0 val_bpb:0.5')",
    ]
    + [f"def part_{i}(x):\n    return x + {i}" for i in range(6)]
    + ["main()"]
)


def bpb_of(loss: float, count: float | None = None, tokens: float = TOKENS) -> float:
    """Bits per byte of `loss` nats per token when `tokens` are counted as `count` bytes (None: as they should be)."""
    count = count or tokens * BYTES / SP1024
    return loss * tokens / count / math.log(2)


def log(
    seed: int = 42,
    loss: float = 1.89,
    *,
    tokens: int = TOKENS,
    count: float | None = None,
    model: int = 15_800_000,
    code: int = 60_000,
    total: str = "Total submission size int6+lzma: {} bytes",
    stop_ms: int = 600_050,
    hessians: float | None = 3.0,
    world_size: int = 8,
    phases: tuple[tuple[str, int], ...] = (("final_int6_roundtrip", 9_000), ("final_int6_sliding_window", 90_000)),
    settings: str = "  vocab_size: 1024\n  tokenizer_path: ./data/tokenizers/fineweb_1024_bpe.model",
    extra: str = "",
    source: str = "",
    after: str = "",
) -> str:
    """A whole log. loss: of the last phase; bits per byte follow from tokens and the bytes they are counted as."""
    ruler = "=" * 100
    lines = [ruler, "Hyperparameters:", f"  seed: {seed}", f"  world_size: {world_size}", "  matrix_lr: 0.02", settings, ruler]
    lines += [source, ruler] if source else []
    lines += [f"val_loader:shards pattern=./data/val_*.bin tokens:{tokens}", "train_shards: 80", extra]
    for step in range(1, 11):
        lines.append(f"step:{step}/9000 train_loss:{6.9 - step / 3 + seed / 1e4:.4f} train_time:{step * 85}ms step_avg:85.00ms")
    before = f"val_loss:{loss + 0.03:.4f} val_bpb:{bpb_of(loss + 0.03, count, tokens):.4f}"
    lines += [f"step:7059/9000 {before} train_time:{stop_ms}ms step_avg:85.00ms"]
    lines += [f"stopping_early: wallclock_cap train_time:{stop_ms}ms step:7059/9000", "Serialized model: 106027446 bytes"]
    lines += [f"Code size: {code} bytes"]
    lines += [f"GPTQ:collected 67 Hessians in {hessians}s"] if hessians is not None else []
    lines += [f"Serialized model int6+lzma: {model} bytes", total.format(model + code)]
    for i, (name, took) in enumerate(phases):
        worse = loss + 0.02 * (len(phases) - 1 - i)
        bpb = bpb_of(worse, count, tokens)
        lines.append(f"{name} val_loss:{worse:.4f} val_bpb:{bpb:.4f} eval_time:{took}ms")
        lines.append(f"{name}_exact val_loss:{worse:.8f} val_bpb:{bpb:.8f}")
    return "\n".join(filter(None, [*lines, after])) + "\n"


def records_folder(
    path: Path, *, losses: dict[int, float] | None = None, claims: dict | None = None, script: str = SCRIPT, **figures
) -> Path:
    """A clean submission of three seeds; `claims` are put over what its submission.json says, None takes a field out."""
    losses = losses or {42: 1.8900, 1337: 1.8910, 2025: 1.8896}
    path.mkdir(parents=True)
    (path / "train_gpt.py").write_text(script)
    figures = {"source": script, "code": len(script)} | figures
    for seed, loss in losses.items():
        (path / f"train_seed{seed}.log").write_text(log(seed, loss, **figures))
    bpb = {seed: round(bpb_of(loss, figures.get("count")), 5) for seed, loss in losses.items()}
    total = figures.get("model", 15_800_000) + figures["code"]
    said = {
        "name": "made up",
        "track": "10min_16mb",
        "val_loss": round(sum(losses.values()) / len(losses), 5),
        "val_bpb": round(sum(bpb.values()) / len(bpb), 4),
        "bytes_total": total,
        "seeds": list(losses),
        "seed_results": {str(seed): {"val_bpb": bpb[seed], "artifact_bytes": total} for seed in losses},
        "compliance": {"eval_under_600s": True, "artifact_under_16mb": True},
    } | (claims or {})
    (path / "submission.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    return path


def readme(path: Path, losses: dict[int, float], **changes: str) -> None:
    """README.md of a records_folder: the table of its seeds. changes: cells to replace, by `seed_column` (`s42_bpb`, `mean_bytes`),
    and `head`, the score it opens with."""
    total = f"{json.loads((path / 'submission.json').read_text())['bytes_total']:,}"
    rows = {f"s{seed}": {"bpb": f"{bpb_of(loss):.4f}", "bytes": total, "steps": "7,059"} for seed, loss in losses.items()}
    rows["mean"] = {"bpb": f"{sum(bpb_of(x) for x in losses.values()) / len(losses):.4f}", "bytes": total, "steps": ""}
    head = changes.pop("head", rows["mean"]["bpb"])
    for name, cell in changes.items():
        row, _, column = name.rpartition("_")
        rows[row][column] = cell
    lines = ["# A record", f"**val_bpb: {head}** (3-seed mean), the baseline has val_bpb 1.2244", ""]
    lines += ["| Seed | Steps | **Sliding BPB** | Gain | Artifact |", "|---|---:|---|---|---|"]
    lines += [f"| {name.lstrip('s')} | {r['steps']} | **{r['bpb']}** | -0.0050 | {r['bytes']} |" for name, r in rows.items()]
    (path / "README.md").write_text("\n".join(lines) + "\n")

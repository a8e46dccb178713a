"""python -m golf_jax.evaluate: score a packed artifact (or a PyTorch checkpoint) in a fresh process, in bits per byte."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from golf_jax import cli
from golf_jax.artifact.model import load_model
from golf_jax.config import EvalConfig, GolfError, ModelConfig, load_recipe
from golf_jax.data import load_val_tokens
from golf_jax.data.corpus import CACHE, build_embedded
from golf_jax.data.tokenizer import Tokenizer, byte_tables, check_tables
from golf_jax.evaluation.fixed import evaluate_sliding, evaluate_standard
from golf_jax.evaluation.legality import check_model
from golf_jax.evaluation.score import Result
from golf_jax.evaluation.ttt import evaluate_ttt
from golf_jax.interop import from_torch
from golf_jax.interop.packed import read_checkpoint, read_packed
from golf_jax.mesh import make_mesh
from golf_jax.processes import initialize_distributed, split_cpu

SAMPLE = 1 << 18  # tokens whose byte count is proved against the decoded text
DESCRIPTION = """Score a packed model in a fresh process, from the artifact and the text alone.

  python -m golf_jax.evaluate runs/quickstart/artifact.golf                        the text it was trained beside
  python -m golf_jax.evaluate artifact.golf --val 'shards/val_*.bin' --tokenizer tokenizer.model
  python -m golf_jax.evaluate artifact.golf --val ... --tokenizer ... --mode ttt   with test-time training
  python -m golf_jax.evaluate --torch final_model.pt --recipe pr1182 --val ... --tokenizer ...

Prints the score with its nats, tokens and bytes, whether it is legal (C1 causal, C2 normalized, C3 scored before trained on, C4 each
target once), and the time. --max-docs gives a quick look, marked PARTIAL. A wrong tokenizer is refused."""


@dataclass(frozen=True)
class Options:
    artifact: Annotated[str, tyro.conf.Positional] = ""
    """Packed model (artifact.golf)."""
    val: str = ""
    """Glob of the validation shards; default: the embedded corpus, for artifacts that were trained on it."""
    tokenizer: str = ""
    """SentencePiece model of the shards; must be the one the artifact was trained with."""
    mode: Literal["auto", "standard", "sliding", "ttt"] = "auto"
    """standard: rows side by side; sliding: window that moves by the stride; ttt: test-time training; auto: sliding, or standard for a
    model whose recipe has no stride."""
    max_docs: int = 0
    """Only the first N documents: a quick look, marked PARTIAL (0: all)."""
    max_tokens: int = 0
    """Only about the first N targets, marked PARTIAL (0: all)."""
    stride: int = 0
    """Stride of the sliding window (0: the recipe's)."""
    batch_rows: int = 0
    """Windows per device and forward pass (0: the recipe's); lower it when memory runs out."""
    devices: int = 0
    """Devices to use (0: all). Of a CPU this many are made (0: about one per core)."""
    json: str = ""
    """Write the result to this file, too."""
    torch: str = ""
    """Score this PyTorch checkpoint (.pt) or packed file (.ptz) of a PR instead; needs golf-jax[torch]."""
    recipe: str = ""
    """With --torch: the PR it belongs to (pr372, pr562, pr638, pr1182, pr2005)."""
    config: str = ""
    """With --torch: JSON file with the PR's hyperparameters where they differ from its defaults."""


@dataclass(frozen=True)
class Subject:
    """What is scored."""

    name: str
    sha256: str
    config: ModelConfig
    params: dict[str, np.ndarray]
    eval: EvalConfig
    seq_len: int
    tokenizer_sha256: str = ""
    """Empty where the file does not say (PyTorch)."""
    embedded: bool = False


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise GolfError(f"{path}: cannot be read ({error.strerror})") from None


def from_artifact(path: str) -> Subject:
    """The model of an artifact. Raises GolfError naming the file."""
    data = _read(path)
    try:
        m = load_model(data)
    except GolfError as error:
        raise GolfError(f"{path}: {error}") from None
    digest = hashlib.sha256(data).hexdigest()
    return Subject(path, digest, m.config, m.params, m.eval, m.seq_len, m.tokenizer_sha256, m.embedded)


def from_pytorch(path: str, recipe: str, config_path: str) -> Subject:
    """A PR's PyTorch file, computed on this platform as the PR ran: its dtypes and RoPE frequencies, its evaluation."""
    if not recipe:
        raise GolfError("--torch needs --recipe (pr372, pr562, pr638, pr1182 or pr2005)")
    data = _read(path)
    try:
        settings = json.loads(_read(config_path)) if config_path else {}
    except ValueError as error:
        raise GolfError(f"{config_path}: not JSON ({error})") from None
    tensors = read_packed(data) if path.endswith(".ptz") else read_checkpoint(path)
    config, params = from_torch(recipe, settings, tensors)
    run = load_recipe(recipe)
    config = replace(config, dtype="auto", attention="auto", rope_bf16_frequencies=run.model.rope_bf16_frequencies)
    lower = {k.lower(): v for k, v in settings.items()}
    seq_len = int(lower.get("eval_seq_len") or lower.get("train_seq_len") or run.data.seq_len)
    return Subject(path, hashlib.sha256(data).hexdigest(), config, params, run.eval, seq_len)


def open_text(subject: Subject, val: str, tokenizer_path: str) -> tuple[np.ndarray, Tokenizer]:
    """Validation tokens and tokenizer. Raises GolfError if they are not those the model was trained with."""
    if not val and not tokenizer_path and subject.embedded:
        directory = Path(build_embedded(CACHE, subject.config.vocab_size)["directory"])
        val, tokenizer_path = str(directory / "val_*.bin"), str(directory / "tokenizer.model")
    if not val or not tokenizer_path:
        raise GolfError("give the validation shards and their tokenizer: --val 'GLOB' --tokenizer MODEL")
    tokenizer = Tokenizer(tokenizer_path)
    if tokenizer.vocab_size != subject.config.vocab_size:
        pieces = f"{tokenizer.vocab_size} pieces, {subject.name} has a vocabulary of {subject.config.vocab_size}"
        raise GolfError(f"--tokenizer {tokenizer_path}: {pieces}; give the tokenizer it was trained with")
    if subject.tokenizer_sha256 and tokenizer.sha256 != subject.tokenizer_sha256:
        hashes = f"SHA-256 {tokenizer.sha256[:12]}..., {subject.name} was trained with {subject.tokenizer_sha256[:12]}..."
        raise GolfError(f"--tokenizer {tokenizer_path}: {hashes}; give the tokenizer it was trained with")
    return load_val_tokens(val, tokenizer.vocab_size), tokenizer


def first_documents(tokens: np.ndarray, bos_id: int, documents: int) -> int:
    """Targets in the first `documents` documents; 0 if there are no more than those."""
    starts = np.flatnonzero(tokens == bos_id)
    return int(starts[documents]) - 1 if documents < len(starts) else 0


def evaluate(subject: Subject, options: Options) -> Result:
    """Score `subject` as the options say. Prints progress on process 0."""
    tokens, tokenizer = open_text(subject, options.val, options.tokenizer)
    tables = byte_tables(tokenizer.processor)
    check_tables(tokenizer, tokens[:SAMPLE], tables)
    limits = [n for n in (options.max_tokens, options.max_docs and first_documents(tokens, tokenizer.bos_id, options.max_docs)) if n]
    eval = subject.eval
    eval = replace(eval, stride=options.stride or eval.stride, batch_rows=options.batch_rows or eval.batch_rows)
    if eval.stride > subject.seq_len:
        raise GolfError(f"--stride {eval.stride} exceeds the window of {subject.seq_len} tokens")
    mesh = make_mesh(options.devices)
    mode = ("sliding" if eval.stride else "standard") if options.mode == "auto" else options.mode
    run: Any = {"standard": evaluate_standard, "sliding": evaluate_sliding, "ttt": evaluate_ttt}[mode]
    say = print if jax.process_index() == 0 else None
    result = run(
        subject.config,
        subject.params,
        tokens,
        tables,
        seq_len=subject.seq_len,
        mesh=mesh,
        eval=eval,
        max_targets=min(limits, default=0),
        log=say,
    )
    result = result[0] if mode == "ttt" else result
    causal, error = check_model(subject.config, subject.params, tokens, mesh, subject.seq_len)
    return replace(result, facts=replace(result.facts, causal=causal, normalization_error=error))


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, prog="python -m golf_jax.evaluate", description=DESCRIPTION, args=argv)
    if bool(options.artifact) == bool(options.torch):
        raise GolfError("name one model: an artifact, or --torch CHECKPOINT --recipe PR")
    initialize_distributed()
    split_cpu(options.devices, sequences=8)
    subject = from_pytorch(options.torch, options.recipe, options.config) if options.torch else from_artifact(options.artifact)
    result = evaluate(subject, options)
    if jax.process_index() == 0:
        print("\n".join(result.lines()))
        if options.json:
            facts = {"model": subject.name, "sha256": subject.sha256, **result.to_dict()}
            Path(options.json).write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)

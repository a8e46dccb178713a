"""python -m golf_jax.evaluate: score a packed artifact (or a PyTorch checkpoint) in a fresh process, in bits per byte."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from golf_jax import cli
from golf_jax.artifact.model import load_model
from golf_jax.config import EvalConfig, GolfError, ModelConfig, load_recipe
from golf_jax.data.text import Text, open_text
from golf_jax.evaluation import Result, score
from golf_jax.interop import from_torch
from golf_jax.interop.packed import read_checkpoint, read_packed
from golf_jax.mesh import make_mesh, platform
from golf_jax.model import Model
from golf_jax.processes import initialize_distributed, split_cpu

DESCRIPTION = """Score a packed model in a fresh process, from the artifact and the text alone.

  python -m golf_jax.evaluate runs/quickstart/artifact.golf                        the text it was trained beside
  python -m golf_jax.evaluate artifact.golf --val 'shards/val_*.bin' --tokenizer tokenizer.model
  python -m golf_jax.evaluate artifact.golf --val ... --tokenizer ... --mode score_first   with test-time training
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
    mode: Literal["auto", "standard", "sliding", "score_first", "adapt_first"] = "auto"
    """standard: rows side by side; sliding: window that moves by the stride; score_first, adapt_first: test-time training; auto: sliding,
    or standard for a model whose recipe has no stride."""
    max_docs: int = 0
    """Only the first N documents: a quick look, marked PARTIAL (0: all)."""
    max_tokens: int = 0
    """Only about the first N targets, marked PARTIAL (0: all)."""
    stride: int = 0
    """Stride of the sliding window, also with test-time training (0: the recipe's)."""
    batch_rows: int = 0
    """Windows per device and forward pass (0: the recipe's, or automatic); lower it when memory runs out."""
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
    tensors = read_packed(recipe, data) if path.endswith(".ptz") else read_checkpoint(path)
    config, params = from_torch(recipe, settings, tensors)
    run = load_recipe(recipe)
    config = replace(config, dtype="auto", attention="auto", rope_bf16_frequencies=run.model.rope_bf16_frequencies)
    lower = {k.lower(): v for k, v in settings.items()}
    seq_len = int(lower.get("eval_seq_len") or lower.get("train_seq_len") or run.data.seq_len)
    return Subject(path, hashlib.sha256(data).hexdigest(), config, params, run.eval, seq_len)


def text_of(subject: Subject, val: str, tokenizer: str) -> Text:
    """Validation text and tokenizer. Raises GolfError if they are not those the model was trained with."""
    embedded = not val and not tokenizer and subject.embedded
    if not embedded and not (val and tokenizer):
        raise GolfError("give the validation shards and their tokenizer: --val 'GLOB' --tokenizer MODEL")
    train, vocab_size = "embedded" if embedded else "", subject.config.vocab_size
    return open_text(train, val, tokenizer, vocab_size, subject.seq_len, sha256=subject.tokenizer_sha256)


def first_documents(tokens: np.ndarray, bos_id: int, documents: int) -> int:
    """Targets in the first `documents` documents; 0 if there are no more than those."""
    starts = np.flatnonzero(tokens == bos_id)
    return int(starts[documents]) - 1 if documents < len(starts) else 0


def evaluate(subject: Subject, options: Options) -> Result:
    """Score `subject` as the options say. Prints progress on process 0."""
    text = text_of(subject, options.val, options.tokenizer)
    documents = options.max_docs and first_documents(text.val_tokens, text.tokenizer.bos_id, options.max_docs)
    limits = [n for n in (options.max_tokens, documents) if n]
    eval = replace(subject.eval, batch_rows=options.batch_rows or subject.eval.batch_rows)
    if options.stride:
        methods = {name: replace(getattr(eval, name), stride=options.stride) for name in ("sliding", "score_first", "adapt_first")}
        eval = replace(eval, **methods)
    mesh = make_mesh(options.devices)
    mode = ("sliding" if eval.sliding.on else "standard") if options.mode == "auto" else options.mode
    say = print if jax.process_index() == 0 else None
    model = Model.open(subject.config, subject.params, platform(mesh))
    most = min(limits, default=0)
    return next(score(model, text, mesh, eval, say, seq_len=subject.seq_len, methods=[mode], max_targets=most))


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

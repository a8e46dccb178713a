"""What a report measures again from a run's files: what quantization did to each tensor, and where in the text the bits go."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from golf_jax.artifact.container import unpack
from golf_jax.config import GolfError
from golf_jax.data.text import Text, open_text
from golf_jax.evaluation.fixed import evaluate_fixed
from golf_jax.evaluation.score_first import evaluate_score_first
from golf_jax.evaluation.stream import Stream
from golf_jax.mesh import make_mesh, platform
from golf_jax.model import resolve, to_tensors
from golf_jax.opening import Model, load
from golf_jax.processes import keep_compiled_programs, split_cpu
from golf_jax.quant.schemes import dequantize_all
from golf_jax.reporting.record import Record
from golf_jax.training.checkpoints import Checkpoints
from golf_jax.training.loop import exported
from golf_jax.training.state import state_shapes


@dataclass(frozen=True)
class TensorError:
    """relative: root mean square of (weights - dequantized weights), over the root mean square of the weights."""

    name: str
    kind: str
    values: int
    relative: float


@dataclass(frozen=True)
class Portion:
    """Bits per byte of some of the targets, and of how many."""

    label: str
    bpb: float
    tokens: int


@dataclass(frozen=True)
class Again:
    """What was measured again, by run. missing: title of a section of the report -> sentences about what could not be."""

    errors: dict[str, list[TensorError]] = field(default_factory=dict)
    scores: dict[str, "Measured"] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def lacks(self, section: str, sentence: str) -> None:
        self.missing.setdefault(section, []).append(sentence)


@dataclass(frozen=True)
class Measured:
    """One run scored again, standard evaluation, over the first `targets` validation targets."""

    targets: int
    bpb: float
    positions: list[Portion]
    """By position in the row: 1, 2, 3-4, 5-8, ... tokens of context."""
    documents: list[Portion]
    """By document, in the order of the text; the label is how it begins. The last may be cut."""
    chunks: list[Portion]
    """By chunk of score-first test-time training; empty for a recipe without it."""


def start() -> None:
    """Once, before anything is computed: the cores of a CPU as devices, compiled programs kept."""
    keep_compiled_programs()
    split_cpu(0, sequences=8)


def quantization_errors(record: Record) -> list[TensorError]:
    """Every quantized tensor of a run against the weights of its last checkpoint, in the artifact's order.

    Raises GolfError where the checkpoint is missing, or is not the one that the artifact was made from.
    """
    if record.ledger is None or "train" not in record.stages:
        raise GolfError(f"{record.path / 'artifact.golf'}: no such file")
    mesh = make_mesh()
    recipe = replace(record.recipe, model=resolve(record.recipe.model, platform(mesh)))
    folder = record.path / "checkpoints"
    if not folder.is_dir():
        raise GolfError(f"{folder}: no checkpoint to compare the artifact with")
    with closing(Checkpoints(folder)) as checkpoints:
        if checkpoints.steps()[:1] != [record.stages["train"]["steps"]]:
            raise GolfError(f"{folder}: holds no checkpoint of the last step")
        found = checkpoints.restore(state_shapes(recipe, mesh), log=lambda line: None)
    assert found is not None
    weights = to_tensors(recipe.model, exported(recipe, found.state))
    qtensors = unpack((record.path / "artifact.golf").read_bytes())[1]
    restored, errors = dequantize_all(qtensors), []
    for name, q in qtensors.items():
        before, after = np.asarray(weights[name], np.float64), np.asarray(restored[name], np.float64)
        size = np.sqrt(np.mean(before**2))
        errors.append(TensorError(name, q.kind, before.size, float(np.sqrt(np.mean((before - after) ** 2)) / size) if size else 0.0))
    return errors


def score_again(record: Record, targets: int) -> Measured:
    """Score about the first `targets` validation targets (0: all) through the artifact. Raises GolfError: no artifact, no text."""
    model, data, mesh = load(record.path), record.recipe.data, make_mesh()
    embedded = data.train == "embedded"
    tokenizer = "" if embedded else str(record.path / "tokenizer.model")
    text = open_text("embedded" if embedded else "", data.val, tokenizer, model.config.vocab_size, data.seq_len)
    stream = Stream.of(text.val_tokens, text.tables, data.seq_len, record.recipe.eval.batch_rows, targets)
    result = evaluate_fixed(model, replace(stream, keep_scores=True), mesh)
    assert result.scores is not None
    tokens = stream.tokens
    bits = result.scores.astype(np.float64) / np.log(2)
    count = text.tables.of_targets(tokens, slice(None))
    # 0, 1, 2, 3, 3, 4, ... for positions 0, 1, 2, 3, 4: the next power of two, so that early positions get a portion of their own
    portion = np.ceil(np.log2(np.arange(stream.targets) % data.seq_len + 1)).astype(int)
    edges = [(1 if p == 0 else 2 ** (p - 1) + 1, min(2**p, data.seq_len)) for p in range(portion.max() + 1)]
    positions = _portions(portion, bits, count, [str(b) if a == b else f"{a}-{b}" for a, b in edges])
    document = np.cumsum(tokens[1:] == text.tokenizer.bos_id)
    starts = np.append(0, np.flatnonzero(tokens[1:] == text.tokenizer.bos_id) + 1)
    documents = _portions(document, bits, count, [_beginning(text, tokens[s : s + 24]) for s in starts])
    return Measured(stream.targets, result.score.bpb, positions, documents, _chunks(record, model, stream))


def _portions(index: np.ndarray, bits: np.ndarray, count: np.ndarray, labels: list[str]) -> list[Portion]:
    """Bits per byte of the targets of every `index`; portions that stand for no byte are left out."""
    sums = [np.bincount(index, weights, len(labels)) for weights in (bits, count, None)]
    return [Portion(label, b / n, int(t)) for label, b, n, t in zip(labels, *sums, strict=True) if n]


def _beginning(text: Text, tokens: np.ndarray) -> str:
    words = " ".join(text.tokenizer.original(tokens[tokens != text.tokenizer.bos_id], strict=False).split())
    return words[:48]


def _chunks(record: Record, model: Model, stream: Stream) -> list[Portion]:
    config = record.recipe.eval.score_first
    if not config.on:
        return []
    trace = evaluate_score_first(model, stream, make_mesh(), config, None).trace
    assert trace is not None
    return [Portion(str(i), nats / np.log(2) / n, int(t)) for i, (nats, t, n) in enumerate(trace.chunks, 1) if n]


def everything(records: Sequence[Record], targets: int, sample_tokens: int) -> Again:
    """targets: to be scored again; sample_tokens: that each model writes after a document start, the same ones every time. 0: none."""
    again = Again()
    for record in records:
        if "pack" not in record.stages:
            again.lacks("Quantization", f"{record.name} has no artifact yet.")
            continue
        try:
            again.errors[record.name] = quantization_errors(record)
        except GolfError as error:
            again.lacks("Quantization", f"{record.name}: the weights before quantization cannot be read ({error}).")
        if sample_tokens:
            try:
                again.samples[record.name] = load(record.path).generate("", sample_tokens)
            except GolfError as error:
                again.lacks("Sample text", f"{record.name}: {error}.")
        if targets:
            again.scores[record.name] = score_again(record, targets)
    if not targets:
        again.lacks("Where the bits go", "Bits per byte by position and by document are not kept by a run; --score-again N measures them.")
    return again

"""python -m golf_jax.evaluate: score a packed artifact (or a PyTorch checkpoint) in a fresh process, in bits per byte."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from golf_jax import cli
from golf_jax.config.base import GolfError, check
from golf_jax.config.model import Attention
from golf_jax.files import check_target, json_text, write_atomic
from golf_jax.progress import to_screen
from golf_jax.supervise import ANEW, several_processes, supervise

WINDOWED = ("sliding", "score_first", "adapt_first")
DESCRIPTION = """Score a packed model in a fresh process, from the artifact and the text alone.

  python -m golf_jax.evaluate runs/quickstart-20261122-111519                      a run: its artifact, its text
  python -m golf_jax.evaluate artifact.golf --val 'shards/val_*.bin' --tokenizer tokenizer.model
  python -m golf_jax.evaluate artifact.golf --val ... --tokenizer ... --mode ttt   with test-time training
  python -m golf_jax.evaluate final_model.pt --recipe pr1182 --val ... --tokenizer ...

Prints the score with its nats, tokens and bytes, whether it is legal (C1 causal, C2 normalized, C3 scored before trained on, C4 each
target once), and the time. --max-docs gives a quick look, marked PARTIAL. A wrong tokenizer is refused."""


@dataclass(frozen=True)
class Options:
    model: Annotated[str, tyro.conf.Positional]
    """Packed model (artifact.golf), a run directory, or a PyTorch file of a PR (.pt, .ptz, .safetensors)."""
    val: str = ""
    """Glob of the validation shards; default: those of the run, or the embedded corpus for artifacts that were trained on it."""
    tokenizer: str = ""
    """SentencePiece model of the shards; must be the one the model was trained with. Default: the one beside the artifact."""
    mode: Literal["auto", "standard", "sliding", "ttt", "score_first", "adapt_first", "packed", "documents"] = "auto"
    """standard: rows side by side; sliding: window that moves by the stride; packed: flat streams of documents; score_first, adapt_first,
    documents: test-time training; ttt: whichever of these the recipe has; auto: sliding, or standard where the recipe has no stride."""
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
    attention: Attention | None = None
    """Attention backend to score with; auto: what this machine gets (default: the one that the model was trained with)."""
    json: str = ""
    """Write the result to this file, too."""
    recipe: str = ""
    """With a PyTorch file: the recipe it belongs to, or a recipe file (default: told by the names and shapes of its tensors)."""

    def __post_init__(self) -> None:
        for name in ("max_docs", "max_tokens", "stride", "batch_rows"):
            flag, value = f"--{name.replace('_', '-')}", getattr(self, name)
            check(value >= 0, f"{flag} must not be negative, got {value}")


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, prog="python -m golf_jax.evaluate", description=DESCRIPTION, args=argv)
    if options.json:
        check_target(options.json)
    if several_processes() and (status := supervise(lambda: ANEW)) is not None:
        return status
    import jax  # here, and what brings it in: --help must not wait for it

    from golf_jax.evaluation import score
    from golf_jax.evaluation.methods import method_of
    from golf_jax.evaluation.stream import first_documents
    from golf_jax.interop import open_model
    from golf_jax.kernels.attention import prepare
    from golf_jax.mesh import make_mesh
    from golf_jax.opening import text_for, with_attention
    from golf_jax.processes import initialize_distributed, keep_compiled_programs, others_alive, split_cpu

    keep_compiled_programs()
    initialize_distributed()
    split_cpu(options.devices, sequences=8)
    say = (to_screen if options.json else print) if jax.process_index() == 0 else lambda line: None
    if options.attention:
        try:  # before the model is opened with what this machine has instead, aloud
            prepare(options.attention)
        except ValueError as error:
            raise GolfError(f"--attention {options.attention}: {error}; auto and xla need none") from None
    model = open_model(options.model, options.recipe, say)
    if options.attention:
        model = with_attention(model, options.attention)
    text = text_for(model, options.val, options.tokenizer)
    doubts = [fact for fact in text.facts if fact.startswith("WARNING")]
    for doubt in doubts:
        say(doubt)
    mesh, eval = make_mesh(options.devices), replace(model.eval, batch_rows=options.batch_rows or model.eval.batch_rows)
    if options.stride:
        eval = replace(eval, **{name: replace(getattr(eval, name), stride=options.stride) for name in WINDOWED})
    documents = first_documents(text.val_tokens, text.tokenizer.bos_id, options.max_docs) if options.max_docs else 0
    most = min(filter(None, (options.max_tokens, documents)), default=0)
    with others_alive(lambda: ANEW):
        result = next(score(model, text, mesh, eval, say, seq_len=model.seq_len, methods=[method_of(eval, options.mode)], max_targets=most))
    if options.json and jax.process_index() == 0:  # before the screen, which may be gone by now
        about = {"model": model.name, "sha256": model.sha256, "text_facts": list(text.facts)}
        write_atomic(options.json, json_text(about | result.to_dict()))
    say("\n".join([*result.lines(), *doubts]))
    return 0


if __name__ == "__main__":
    cli.run(main, computes=True)

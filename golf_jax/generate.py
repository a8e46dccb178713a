"""python -m golf_jax.generate: let a packed model write, from a prompt or prompt after prompt."""

import contextlib
import os
import sys
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from golf_jax import cli
from golf_jax.config import GolfError, escape
from golf_jax.options import Sampling

if TYPE_CHECKING:  # what brings jax in is imported where it is used: --help must not wait for it
    from golf_jax.opening import Model

DESCRIPTION = """Let a packed model write.

  python -m golf_jax.generate runs/quickstart --prompt 'The history of'
  python -m golf_jax.generate artifact.golf --tokenizer tokenizer.model      prompts from the terminal

The text ends with the document or after --max-tokens; the speed is told on stderr."""


@dataclass(frozen=True)
class Options:
    model: Annotated[str, tyro.conf.Positional]
    """Packed model (artifact.golf) or run directory."""
    prompt: str | None = None
    """Beginning of the text; empty: a new document. Without it, each line of the terminal is one."""
    max_tokens: int = 256
    """End of the text, if the document does not end before."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    tokenizer: str = ""
    """SentencePiece model. Default: the one beside the artifact."""


def write(model: "Model", prompt: str, max_tokens: int, sampling: Sampling) -> str:
    """Print the text as it comes; returns what is to be said about speed. The first token waits for compilation and the prompt."""
    begin = first = time.perf_counter()
    with contextlib.suppress(UnicodeError):  # what the encoder refuses
        prompt = os.fsencode(prompt).decode()  # where the locale is not UTF-8, as the terminal is
    tokens, shown = model.encode(prompt), prompt
    given, screen = len(tokens), sys.stdout.isatty()
    _show(prompt, screen)
    for token in model.stream(tokens, sampling):
        if len(tokens) == given:
            first = time.perf_counter()
        if token == tokens[0] or len(tokens) - given == max_tokens:  # the next document begins
            break
        tokens.append(token)
        text = model.decode(tokens[1:])
        if not text.endswith("\ufffd"):  # in the middle of a character of several bytes
            _show(text[len(shown) :], screen)
            shown = text
    print()
    count, seconds = len(tokens) - given, time.perf_counter() - first
    speed = f"{(count - 1) / seconds:.1f} tokens/s" if count > 1 else "no speed"
    return f"{count} tokens, {speed}; the first after {first - begin:.1f} s (compilation, {given} tokens of prompt)"


def _show(text: str, screen: bool) -> None:
    """Print without a line's end; to a screen without what would steer it, which a model may write as any other text."""
    print("".join(c if unicodedata.category(c) != "Cc" or c in "\n\t" else escape(c) for c in text) if screen else text, end="", flush=True)


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, prog="python -m golf_jax.generate", description=DESCRIPTION, args=argv)
    if options.max_tokens < 1:
        raise GolfError(f"--max-tokens must be positive, got {options.max_tokens}")
    from golf_jax.opening import load
    from golf_jax.processes import keep_compiled_programs

    keep_compiled_programs()
    model = load(options.model, options.tokenizer)
    if options.prompt is not None:
        print(write(model, options.prompt, options.max_tokens, options.sampling), file=sys.stderr)
        return 0
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        print(write(model, line.rstrip("\n"), options.max_tokens, options.sampling), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)

"""`python -m golf_jax.data build | download | verify`: training data from text, from the hub, and its inspection."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from golf_jax import cli
from golf_jax.config import GolfError


@dataclass(frozen=True)
class Build:
    """Make tokenizer, shards and manifest.json from your own text.

    A text file is one document; a long one is cut at blank lines (else line ends, else spaces) into documents of 8,192 characters or
    a little more. JSONL has one document per line. A directory gives all .txt, .md, .jsonl and .ndjson files below it, in name order.
    Training reads documents in this order: shuffle them beforehand if neighbours are alike. Example:

      python -m golf_jax.data build books/ --out data/books --vocab-size 1024
    """

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Text files, JSONL files, or directories of them."""
    out: Path
    """New directory for tokenizer.model, train_*.bin, val_*.bin and manifest.json."""
    vocab_size: int = 1024
    """Pieces of the BPE model that is trained (at most 65,536). Ignored with --tokenizer."""
    tokenizer: Path | None = None
    """A SentencePiece .model to use instead of training one."""
    val_every: int = 10
    """One document in this many is held out, chosen by the hash of its text."""
    shard_tokens: int = 100_000_000
    """Tokens per file."""
    field: str = "text"
    """Field of a JSON line that holds the text."""
    transform: Literal["", "caseops"] = ""
    """caseops: capitals of words as operator pieces before them, and bytes of the original text in val_bytes_*.bin (PR 2135)."""
    glob: str = ""
    """Files of a directory to read instead, such as '*.py'."""

    def run(self) -> int:
        from golf_jax.data.build import build
        from golf_jax.progress import to_screen

        if not self.inputs:
            raise GolfError("build: name at least one text file, JSONL file or directory")
        manifest = build(
            self.inputs,
            self.out,
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer,
            val_every=self.val_every,
            shard_tokens=self.shard_tokens,
            field=self.field,
            transform=self.transform,
            pattern=self.glob,
            log=to_screen,
        )
        files = {"train": "train_*.bin", "val": "val_*.bin", "tokenizer": "tokenizer.model"}
        flags = " ".join(f"--data.{flag} {shlex.quote(f'{self.out}/{name}')}" for flag, name in files.items())
        print(f"train with: {flags} --model.vocab-size {manifest['tokenizer']['vocab_size']}")
        return 0


@dataclass(frozen=True)
class Download:
    """Fetch the challenge's official FineWeb shards and tokenizer (needs `pip install 'golf-jax[data]'`).

    Every shard has 100 million tokens (200 MB). Validation is always complete. Run again to resume, or to add shards. Example:

      python -m golf_jax.data download sp1024 --train-shards 10
    """

    variant: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="VARIANT")]
    """sp1024, sp8192, ...: the tokenizer family; sp8192_lossless_caps_caseops_v1_reserved: PR 2135's."""
    out: Path = Path("data")
    """Root directory: gets datasets/, tokenizers/ and manifest.json."""
    train_shards: int = 80
    """How many training shards, from the first on (the order is frozen, so fewer is a prefix of more)."""
    repo: str = ""
    """Dataset repository on the Hugging Face hub with the same layout. Default: the challenge's, of CaseOps text the record's."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""

    def run(self) -> int:
        from golf_jax.data.download import download, hub_of
        from golf_jax.progress import to_screen

        directory = download(self.variant, self.out, self.train_shards, hub_of(self.variant, self.repo, self.revision), to_screen)
        print(f"complete: {directory}; check it in depth with `python -m golf_jax.data verify {directory}`")
        return 0


@dataclass(frozen=True)
class Verify:
    """Check a data directory: headers, lengths, token range, hashes, BOS, byte tables, no validation text in training.

    Exit status 1 when something is wrong. Example:

      python -m golf_jax.data verify data/datasets/fineweb10B_sp1024
    """

    directory: tyro.conf.Positional[Path]
    """Directory with *train*.bin and *val*.bin, and manifest.json as `build` and `download` write it."""
    tokenizer: Path | None = None
    """SentencePiece .model; needed only where no manifest.json names one."""

    def run(self) -> int:
        from golf_jax.data.verify import verify_directory
        from golf_jax.progress import to_screen

        report = verify_directory(self.directory, self.tokenizer, to_screen)
        print("\n".join(report.facts))
        for problem in report.problems:
            print(f"PROBLEM: {problem}")
        print(f"{len(report.problems)} problem(s)" if report.problems else "sound")
        return 1 if report.problems else 0


Command = (
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[Download, tyro.conf.subcommand("download")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def main(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status: 0 fine, 1 problems found. Raises GolfError."""
    command: Build | Download | Verify = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="python -m golf_jax.data",
        description=__doc__,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return command.run()


if __name__ == "__main__":
    cli.run(main)

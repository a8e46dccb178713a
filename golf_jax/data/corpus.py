"""The embedded corpus: about 2 MB of English that every CPython carries, so that the first run needs no download.

The help topics of `pydoc` and the docstrings of the standard library, read from its source files, never imported. The
text depends on the Python version (the manifest's hashes say which); two machines with the same Python get the same bytes.
"""

import contextlib
import functools
import hashlib
import inspect
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from golf_jax.config import GolfError
from golf_jax.data.build import build_documents
from golf_jax.data.manifest import NAME, damage, read_manifest
from golf_jax.files import remove

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "__pycache__"}
RULES = "6"  # counts changes of what `documents` and `train_bpe` do


def _sources() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in SKIPPED and not name.startswith("config-")]
        # _sysconfigdata* is written by each build of Python: no text, and another hash on every machine
        found += [Path(folder, file) for file in files if file.endswith(".py") and not file.startswith("_sysconfigdata")]
    if not found:
        raise GolfError(f"embedded corpus: no Python sources in {root}; give text with `python -m golf_jax.data build`")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise GolfError("embedded corpus: this Python lacks pydoc_data; use `python -m golf_jax.data build`") from error
    return topics


def _docstrings(source: str) -> Iterator[str]:
    """What stands in three double quotes first in the module, or behind a line that ends in a colon, as it is written there.

    Found without a parser, whose trees of all sources would take longer than everything else that the corpus needs.
    """
    parts = source.split('"""')
    if len(parts) % 2 == 0:  # such quotes within other quotes: what is code and what is text cannot be told
        return
    for before, text in zip(parts[::2], parts[1::2], strict=False):
        above, _, line = before.rpartition("\n")
        if line.strip() in ("", "r", "R"):
            code = [row for row in above.split("\n") if row.strip() and not row.lstrip().startswith("#")]
            if (not code or code[-1].rstrip().endswith(":")) and (cleaned := inspect.cleandoc(text).strip()):
                yield cleaned


def documents() -> list[str]:
    """Every topic, and per module its docstrings (each once in the corpus), ordered by SHA-256: a shuffle without a seed.

    A topic that is a section of another ("for" of "compound") is left out: it would be validation text that is trained on.
    """
    topics = {text: " ".join(text.split()) for text in _topics().values()}
    bodies = {text: " ".join(text.strip().split("\n", 2)[-1].split()) for text in topics}  # without the two lines of the title
    texts, seen = [text for text, body in bodies.items() if sum(body in other for other in topics.values()) == 1], set()
    for path in _sources():
        with contextlib.suppress(UnicodeDecodeError, OSError):
            new = [text for text in _docstrings(path.read_text(encoding="utf8")) if not (text in seen or seen.add(text))]
            if new:
                texts.append("\n\n".join(new))
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


@functools.cache
def content_hash(vocab_size: int) -> str:
    """Identity of the corpus and what is made of it: rules, texts and sources, tokenizer trainer. Reads some 600 files, once."""
    head = f"{RULES} {vocab_size} {sentencepiece.__version__}"
    return hashlib.sha256(b"".join([head.encode(), *map(str.encode, _topics().values()), *map(Path.read_bytes, _sources())])).hexdigest()


def build_embedded(root: str | Path, vocab_size: int = 1024) -> dict[str, Any]:
    """Shards and tokenizer of the embedded corpus under `root`, made once per content hash; returns the manifest.

    The manifest gains `directory`: the folder with tokenizer.model, train_*.bin and val_*.bin. Two processes may build at the same
    time: the directory appears by one rename, and the slower one takes the faster one's. A directory that is not what its manifest
    says is made anew.
    """
    directory = Path(root) / f"embedded-{vocab_size}-{content_hash(vocab_size)[:12]}"
    if os.path.lexists(directory) and (problem := damage(directory)):
        print(f"embedded corpus: {problem}; made anew", file=sys.stderr)
        try:
            remove(directory)
        except OSError as error:
            raise GolfError(f"{directory}: damaged, and cannot be moved away ({error.strerror}); remove it") from None
    if not directory.exists():
        print(f"embedded corpus: made once, in {directory}: a few seconds", file=sys.stderr, flush=True)
        python = f"{platform.python_implementation()} {platform.python_version()} on {sys.platform}"
        texts = documents()
        try:
            build_documents(
                lambda: texts,
                directory,
                source=f"pydoc topics and standard library docstrings of {python}",
                vocab_size=vocab_size,
                log=lambda line: None,
            )
        except GolfError:
            if not directory.exists():
                raise
    return {**read_manifest(directory / NAME), "directory": str(directory)}

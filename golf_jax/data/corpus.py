"""The embedded corpus: about 2 MB of English that every CPython carries, so that the first run needs no download.

The help topics of `pydoc` and the docstrings of the standard library, read from its source files with `ast`, never imported. The
text depends on the Python version (the manifest's hashes say which); two machines with the same Python get the same bytes.
"""

import ast
import contextlib
import gc
import hashlib
import os
import platform
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from golf_jax.config import GolfError
from golf_jax.data.build import build_documents
from golf_jax.data.manifest import NAME, damage, read_manifest
from golf_jax.files import remove

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "__pycache__"}
RULES = "5"  # counts changes of what `documents` and `train_bpe` do
PARSER = threading.Lock()  # ast.parse in two threads at once fails on CPython 3.11 (SystemError: recursion depth mismatch)


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


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
        yield text
    for child in getattr(node, "body", []) + getattr(node, "orelse", []):
        if isinstance(child, ast.stmt):
            yield from _docstrings(child)


def documents() -> list[str]:
    """Every topic, and per module its docstrings (each once in the corpus), ordered by SHA-256: a shuffle without a seed.

    A topic that is a section of another ("for" of "compound") is left out: it would be validation text that is trained on.
    """
    topics = {text: " ".join(text.split()) for text in _topics().values()}
    bodies = {text: " ".join(text.strip().split("\n", 2)[-1].split()) for text in topics}  # without the two lines of the title
    texts, seen = [text for text, body in bodies.items() if sum(body in other for other in topics.values()) == 1], set()
    with _no_collection():
        _add_docstrings(texts, seen)
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Syntax trees have no cycles, and a collector that looks at all of jax while they are made takes as long as the parser."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _add_docstrings(texts: list[str], seen: set[str]) -> None:
    for path in _sources():
        try:
            with PARSER, warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates and the like: not text of the corpus
        new = [text for text in _docstrings(tree) if not (text in seen or seen.add(text))]
        if new:
            texts.append("\n\n".join(new))


def content_hash(vocab_size: int) -> str:
    """Identity of the corpus and what is made of it: rules, texts and sources, tokenizer trainer."""
    digest = hashlib.sha256(f"{RULES} {vocab_size} {sentencepiece.__version__}".encode())
    for text in _topics().values():
        digest.update(text.encode())
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()


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

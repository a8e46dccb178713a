"""Documents of text files, JSON lines and directories of both, as people have them."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from golf_jax.config import GolfError
from golf_jax.files import refuse_pointer

PATTERNS = ("*.txt", "*.md", "*.jsonl", "*.ndjson")
JSON_LINES = (".jsonl", ".ndjson")
LONG_DOCUMENT = 8192  # characters; a longer text file is cut, so that one book can be split too
CUTS = tuple(re.compile(pattern) for pattern in (r"\n[^\S\n]*\n", r"\n", r"\s"))  # white line, line end, space: the best there is


def find_files(inputs: Sequence[str | Path], pattern: str = "") -> tuple[list[Path], list[Path]]:
    """(files to read, files left out) of `inputs`; directories in name order, all below that match `pattern` or PATTERNS.

    macOS resource forks (`._name`), pipes, broken links and links to directories are left out in directories.
    GolfError for what is missing or no file, or if nothing is found.
    """
    found: list[Path] = []
    skipped: list[Path] = []
    patterns = (pattern,) if pattern else PATTERNS
    for path in map(Path, inputs):
        if not path.is_dir():
            if not path.is_file():
                raise GolfError(f"{path}: cannot be read ({'not a regular file' if path.exists() else 'No such file or directory'})")
            found.append(path)
            continue
        files = [file for file in sorted(path.rglob("*")) if file.is_symlink() or not file.is_dir()]  # a link to a folder is not followed
        chosen = [
            f for f in files if f.is_file() and not f.name.startswith("._") and any(Path(f.name.lower()).match(p.lower()) for p in patterns)
        ]
        if not chosen:
            raise GolfError(f"{path}: holds no {', '.join(patterns)} file among {len(files)}; --glob '*.py' names others")
        found += chosen
        skipped += sorted(set(files) - set(chosen))
    return found, skipped


def read_documents(files: Sequence[Path], field: str = "text", counts: Counter[Path] | None = None) -> Iterator[str]:
    """Documents of `files` in order: JSON lines have one per line in `field`, others are text, cut when long. Text stays as it is.

    `counts` gains the documents that each file gave. GolfError names file and line of what is no UTF-8 or no such JSON.
    """
    for path in files:
        for text in _read_json_lines(path, field) if path.suffix.lower() in JSON_LINES else cut(_read(path)):
            if counts is not None:
                counts[path] += 1
            yield text


def _decode(path: Path, raw: bytes, line: int = 1) -> str:
    refuse_pointer(path, raw)
    try:
        text = raw.decode()
        if len(raw) < 5 * raw.count(0):  # what UTF-16 without a mark is mistaken for: every character and a NUL
            raise GolfError(f"{path}:{line}: more than a fifth are NUL bytes: UTF-16, or no text; convert it to UTF-8")
        return text
    except UnicodeDecodeError as error:
        raise GolfError(f"{path}:{line + raw[: error.start].count(10)}: not UTF-8 text (byte {error.start})") from error


def _read(path: Path) -> str:
    try:
        return _decode(path, path.read_bytes()).removeprefix("\ufeff")
    except OSError as error:
        raise GolfError(f"{path}: cannot be read ({error.strerror})") from error


def cut(text: str) -> Iterator[str]:
    """`text` in parts of 8,192 characters or a little more, ending at a white line, else a line end, else a space; nothing is lost."""
    start = 0
    while len(text) - start > LONG_DOCUMENT:
        earliest, latest = start + LONG_DOCUMENT, start + 2 * LONG_DOCUMENT
        found = next((match for pattern in CUTS if (match := pattern.search(text, earliest, latest))), None)
        stop = found.end() if found else min(latest, len(text))
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _read_json_lines(path: Path, field: str) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = _decode(path, raw, number).removeprefix("\ufeff" if number == 1 else "")
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[field]  # as people write it: with NaN beside the text
                    text.encode()
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    cause = f"{error}; " if isinstance(error, ValueError | RecursionError) else ""
                    raise GolfError(
                        f"{path}:{number}: {cause}needs a JSON object with a string field `{field}` (--field names another)"
                    ) from error
                yield text
    except OSError as error:
        raise GolfError(f"{path}: cannot be read ({error.strerror})") from error

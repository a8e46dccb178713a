"""The code that ships with a model: one file, reproducible and reversible, counted against the cap.

A Python zip application holding the entry module and everything of this project it imports, found by reading the import statements.
The sources sit in one bzip2 stream (text sorts better than it repeats: 7 % less than xz) behind a small loader, so `python bundle.pyz
ARGS` runs the entry module wherever the dependencies are installed. Before the archive stands a line that says so, and how to read them.
"""

import bz2
import io
import json
import lzma
import re
import zipfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from golf_jax.artifact.codecs import ArtifactError
from golf_jax.config import GolfError, parse_json

# Where the sources lie; the longest name that a module begins with counts.
FOLDERS = {name: Path(import_module(name).__path__[0]) for name in ("golf_jax", "golf_jax.kernels", "golf_jax.configs")}
MAX_SOURCE = 1 << 24  # bytes of sources that are unpacked: twenty times this project
_IMPORT = re.compile(r"^[ \t]*(?:import[ \t]+([\w., \t]+)|from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n;]*))", re.MULTILINE)
_EPOCH = (1980, 1, 1, 0, 0, 0)
_HEAD = b"""# golf_jax's sources, compressed. Run: python THIS --help. Read: python -c 'import bz2, json, zipfile
# for p, t in json.loads(bz2.decompress(zipfile.ZipFile("THIS").read("source.bz2"))).items(): print("#", p); print(t)'
"""
_LOADER = """import bz2,json,os,runpy,sys,tempfile
with tempfile.TemporaryDirectory() as d:
 for p,t in json.loads(bz2.decompress(__loader__.get_data("source.bz2"))).items():
  p=os.path.join(d,p);os.makedirs(os.path.dirname(p),exist_ok=True)
  with open(p,"w",encoding="utf8") as f:f.write(t)
 sys.path.insert(0,d)
 runpy.run_module({entry!r},run_name="__main__",alter_sys=True)
"""


def module_sources(modules: Sequence[str]) -> dict[str, str]:
    """Path -> source of the named modules and of all modules of this project that they import, directly or not.

    Imports inside functions count; modules loaded by name (a recipe, the embedded corpus, what only writes text) must be named.
    """
    found: dict[str, str] = {}
    pending = {name: _module_path(name) for name in modules}
    seen = set(pending)
    while pending:
        name, path = pending.popitem()
        if path is None:
            raise GolfError(f"bundle: golf_jax has no module {name}")
        relative = name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        found[relative] = path.read_text(encoding="utf8")
        if (compiled := path.with_suffix(".cc")).is_file():  # what the module has a compiler make of it
            for file in (compiled, *compiled.parent.glob("*.h")):
                found[f"{relative.rpartition('/')[0]}/{file.name}"] = file.read_text(encoding="utf8")
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        imports = _imports(found[relative], package)
        if "." in name:
            imports.add(name.rpartition(".")[0])  # importing a.b runs a first
        pending |= {new: path for new in imports - seen if (path := _module_path(new))}
        seen |= imports
    return dict(sorted(found.items()))


def bundle(entry: str, *modules: str) -> bytes:
    """The shipped file: `entry` is what it runs (`golf_jax.train`), modules are further roots (`configs.pr638`).

    A package is run by its `__main__`. The same sources give the same bytes.
    """
    main = entry + ".__main__"
    roots = [entry, *modules] + ([main] if _module_path(main) else [])
    raw = json.dumps(module_sources(roots), separators=(",", ":"), ensure_ascii=False).encode()
    out = io.BytesIO()
    out.write(_HEAD)
    with zipfile.ZipFile(out, "a") as z:
        z.writestr(zipfile.ZipInfo("__main__.py", _EPOCH), _LOADER.format(entry=entry), zipfile.ZIP_DEFLATED)
        z.writestr(zipfile.ZipInfo("source.bz2", _EPOCH), bz2.compress(raw), zipfile.ZIP_STORED)
    return out.getvalue()


def unbundle(data: bytes) -> dict[str, str]:
    """Path -> source, exactly as bundled. Nothing is executed. Raises ArtifactError."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            old = "source.xz" in z.namelist()  # as runs up to November 2026 have it
            entry = z.getinfo("source.xz" if old else "source.bz2")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("its sources are compressed twice")
            packed = z.read(entry)
        decoder = lzma.LZMADecompressor(memlimit=1 << 27) if old else bz2.BZ2Decompressor()
        raw = decoder.decompress(packed, MAX_SOURCE)
        if not decoder.eof:
            raise ValueError(f"its sources are cut short, or more than {MAX_SOURCE:,} bytes")
        found = parse_json(raw)
        if not (isinstance(found, dict) and all(isinstance(source, str) for source in found.values())):
            raise ValueError("its sources are no texts by path")
        "".join(found.values()).encode()  # a lone surrogate is no text
        return found
    except Exception as e:  # damage of a zip raises half a dozen types
        raise ArtifactError(f"not a code bundle of golf_jax ({str(e) or type(e).__name__})") from None


def raw_code_bytes(data: bytes) -> int:
    """UTF-8 bytes of the bundled sources, uncompressed."""
    return sum(len(source.encode()) for source in unbundle(data).values())


def runs_here(data: bytes) -> bool:
    """Whether the bundled sources are those of this process: another version of golf_jax has others. Raises ArtifactError."""

    def here(path: str) -> str | None:
        folder = max((p for p in FOLDERS if path.startswith(p.replace(".", "/") + "/")), key=len, default="")
        file = FOLDERS[folder] / path[len(folder) + 1 :] if folder else Path()
        return file.read_text(encoding="utf8") if file.is_file() else None

    return all(here(path) == source for path, source in unbundle(data).items())


def _module_path(name: str) -> Path | None:
    package = max((p for p in FOLDERS if f"{name}.".startswith(f"{p}.")), key=len, default="")
    if not package:
        return None
    base = FOLDERS[package].joinpath(*name.removeprefix(package).split(".")[1:])
    for path in (base / "__init__.py", base.with_name(base.name + ".py")):
        if path.is_file():
            return path
    return None


def _imports(source: str, package: str) -> set[str]:
    """Every name that the import statements of `source` could mean. Of the statements alone: to parse all of this package takes a third
    of a second of a start of three."""
    names: set[str] = set()
    for plain, origin, listed in _IMPORT.findall(source):
        names |= {name.split()[0] for name in plain.split(",") if name.strip()}
        if origin:
            level = len(origin) - len(module := origin.lstrip("."))
            parts = package.split(".")[: len(package.split(".")) - level + 1] if level else []
            module = ".".join([*parts, *([module] if module else [])])
            listed = re.sub("#.*", "", listed).strip("() \t")
            names |= {module} | {f"{module}.{name.split()[0]}" for name in listed.split(",") if name.strip()}
    return names

"""What is inside an artifact, and how many bytes are left to the cap."""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from golf_jax import cli
from golf_jax.config import escape, named
from golf_jax.files import read_bytes


@dataclass(frozen=True)
class Options:
    path: tyro.conf.Positional[Path]
    """artifact.golf, or the run directory that holds it."""
    code: Path | None = None
    """The code that ships with it, counted as well (default: code.pyz beside it, where there is one)."""
    tensors: bool = False
    """List every tensor."""
    export: Path | None = None
    """Write the weights to this .safetensors file, for other programs; `golf_jax.evaluate FILE` scores it as it scores the artifact."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, args=argv, prog="python -m golf_jax.artifact", description=__doc__)
    from golf_jax.artifact.code import raw_code_bytes  # and what follows brings jax in: --help must not wait for it
    from golf_jax.artifact.container import MAX_FILE_BYTES, inspect, tensors_of
    from golf_jax.artifact.ledger import ledger
    from golf_jax.interop import export_artifact

    path = options.path / "artifact.golf" if options.path.is_dir() else options.path
    beside = path.with_name("code.pyz")
    code_path = options.code or (beside if beside.is_file() else None)
    data = read_bytes(path, MAX_FILE_BYTES)
    code = read_bytes(code_path) if code_path else b""
    with named(path):
        opened = inspect(data)
        tensors_of(opened)
        table = ledger(data, len(code)).table()
    print(f"{path}: {len(data):,} bytes, {opened.compressor}, {len(opened.entries)} tensors, whole and unaltered")
    print(json.dumps(opened.header, indent=1))
    if options.tensors:
        for e in opened.entries:
            print(f"{escape(e.name):<36} {e.kind:<9} {e.dtype:<9} {'x'.join(map(str, e.shape)) or 'scalar'}")
    print(table)
    if zipfile.is_zipfile(io.BytesIO(code)):
        print(f"code: {raw_code_bytes(code):,} bytes of source, {len(code):,} as shipped ({code_path})")
    if options.export:
        print(f"{options.export}: {export_artifact(data, options.export)} tensors written")
    return 0


if __name__ == "__main__":
    cli.run(main)

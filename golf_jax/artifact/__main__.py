"""`python -m golf_jax.artifact FILE`: what is inside an artifact, and how many bytes are left to the cap."""

import argparse
import json
import sys

from golf_jax.artifact.code import raw_code_bytes
from golf_jax.artifact.container import inspect, read_bytes, unpack
from golf_jax.artifact.ledger import ledger
from golf_jax.config import GolfError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m golf_jax.artifact", description=__doc__)
    parser.add_argument("file", help="artifact.golf")
    parser.add_argument("--code", default="", metavar="FILE", help="the code that ships with it, to be counted as well")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    args = parser.parse_args(argv)
    try:
        data = read_bytes(args.file)
        code = read_bytes(args.code) if args.code else b""
        opened = inspect(data)
        _, tensors = unpack(data)
        print(f"{args.file}: {len(data):,} bytes, {opened.compressor}, {len(tensors)} tensors, whole and unaltered")
        print(json.dumps(opened.header, indent=1))
        if args.tensors:
            for e in opened.entries:
                print(f"{e.name:<36} {e.kind:<9} {e.dtype:<9} {'x'.join(map(str, e.shape)) or 'scalar'}")
        print(ledger(data, len(code)).table())
        if code[:2] == b"PK":
            print(f"code: {raw_code_bytes(code):,} bytes of source, {len(code):,} as shipped")
    except GolfError as e:
        print(f"error: {e}" if args.file in str(e) else f"error: {args.file}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

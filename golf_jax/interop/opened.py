"""Models in any file that holds one, opened for use; artifacts as `.safetensors` for other programs."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from golf_jax.artifact.model import describe, load_model
from golf_jax.config import GolfError, load_recipe, named, parse_json
from golf_jax.files import read_bytes
from golf_jax.interop.packed import canonical_state, read_checkpoint
from golf_jax.interop.safetensors import read_metadata, write_safetensors
from golf_jax.interop.torch_names import open_torch, pr_names
from golf_jax.model.params import from_tensors, to_tensors
from golf_jax.opening import Model, load, opened_here
from golf_jax.progress import Log

FOREIGN = (".pt", ".pth", ".ptz", ".safetensors")
HEADER = "golf_jax"  # key of the metadata of a .safetensors file: the artifact's header
DIGEST = "golf_jax_sha256"  # of it and the weights


def open_model(path: str, recipe: str = "", log: Log = print) -> Model:
    """The model of an artifact, a run directory or a PyTorch file, which is computed and scored as its recipe says.

    recipe: of a PyTorch file, a shipped one or a recipe file; empty: told by the names and shapes of its tensors, and said to `log`. A
    `.safetensors` file that `export_artifact` wrote carries its own. Raises GolfError naming the file.
    """
    if Path(path).suffix not in FOREIGN:
        if recipe:
            raise GolfError(f"--recipe {recipe}: {path} is no PyTorch file and says its own configuration; leave --recipe out")
        return load(path)
    header = read_metadata(path).get(HEADER) if path.endswith(".safetensors") and Path(path).is_file() else None
    if header and not recipe:
        return _exported(path, header)
    config, params, name = open_torch(path, recipe, log)
    run = load_recipe(name)
    return opened_here(config, params, name=path, eval=run.eval, seq_len=run.data.seq_len, sha256=_sha256(path))


def _exported(path: str, header: str) -> Model:
    tensors = read_checkpoint(path)
    if read_metadata(path).get(DIGEST) != _digest(tensors, header):
        raise GolfError(f"{path}: was altered since an artifact was exported to it; export it again, or name the --recipe of these weights")
    with named(f"{path}: its metadata are not those of a model"):
        about = describe(parse_json(header), {name: x.shape for name, x in tensors.items()})
        params = from_tensors(about.config, tensors)
    facts = {"eval": about.eval, "seq_len": about.seq_len, "tokenizer_sha256": about.tokenizer_sha256, "embedded": about.embedded}
    return opened_here(about.config, params, name=path, sha256=_sha256(path), **facts)


def export_artifact(artifact: bytes, path: str | Path) -> int:
    """Write an artifact's dequantized weights as `.safetensors`, by the challenge's names, linear weights (out, in); returns how many.

    PR 372's and 1182's records get the names of their own scripts. The artifact's header goes along as metadata, so that
    `open_model` gives the same model again, value by value.
    """
    if Path(path).suffix != ".safetensors":
        raise GolfError(f"--export {path}: weights are written as .safetensors; give a name that ends so")
    model = load_model(artifact)
    tensors = pr_names(model.header["name"], model.config, to_tensors(model.config, model.params))
    header = json.dumps(model.header)
    digest = _digest(canonical_state({n: np.asarray(x) for n, x in tensors.items()}, str(path)), header)
    write_safetensors(tensors, path, {HEADER: header, DIGEST: digest})
    return len(tensors)


def _digest(tensors: Mapping[str, np.ndarray], header: str) -> str:
    """Of header, names, shapes and values, as `read_checkpoint` gives them."""
    found = hashlib.sha256(header.encode())
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {x.shape}\n".encode() + np.ascontiguousarray(x).tobytes())
    return found.hexdigest()


def _sha256(path: str) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()

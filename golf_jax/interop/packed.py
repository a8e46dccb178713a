"""Reading what the PRs' PyTorch scripts write: packed `.ptz` artifacts and `final_model.pt` checkpoints.

Both are pickles; they are opened only through `torch.load(weights_only=True)`, which builds tensors and plain containers and nothing
else. torch comes with the extra `golf-jax[torch]`. Names are canonical: smear.gate in every recipe, banks split into layers.
"""

import io
import lzma
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import brotli
import ml_dtypes
import numpy as np
import zstandard

from golf_jax.config import GolfError
from golf_jax.quant import QTensor, dequantize_all

PACKING = {"pr372": "zstd", "pr562": "zstd", "pr638": "zstd", "pr1182": "xz", "pr2005": "brotli"}
MAX_RAW_BYTES = 1 << 30
_BANKS = {
    "qo_bank": ("attn.c_q.weight", "attn.proj.weight"),
    "kv_bank": ("attn.c_k.weight", "attn.c_v.weight"),
    "mlp_up_bank": ("mlp.fc.weight",),
    "mlp_down_bank": ("mlp.proj.weight",),
}


def read_packed(recipe: str, data: bytes) -> dict[str, np.ndarray]:
    """The dequantized weights, float32 by canonical name, of a `.ptz` file that the script of `recipe` (pr372, ...) wrote."""
    return dequantize_all(read_packed_codes(recipe, data))


def read_packed_codes(recipe: str, data: bytes) -> dict[str, QTensor]:
    """The codes, scales and pass-through values in such a file. Raises GolfError for anything that is not one."""
    if recipe not in PACKING:
        raise GolfError(f"no packed format known for recipe {recipe!r}; known: {', '.join(PACKING)}")
    where = f"packed file of {recipe}"
    stored = _torch_load(io.BytesIO(_decompress(PACKING[recipe], data, where)), where)
    try:
        read = _codes_of_372 if recipe == "pr372" else _codes_of_w_and_m
        return {canonical_name(n): q for n, q in read(stored).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise GolfError(f"{where}: not the layout this recipe writes ({type(e).__name__}: {e})") from None


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a `final_model.pt` (a state_dict), float32 or bfloat16 as stored, by canonical name with banks split."""
    path = Path(path)
    if not path.is_file():
        raise GolfError(f"{path}: no such checkpoint")
    state = _torch_load(path, str(path))
    if not isinstance(state, Mapping) or not all(hasattr(v, "dtype") for v in state.values()):
        raise GolfError(f"{path}: not a state_dict of tensors")
    return split_banks({canonical_name(n): _numpy(v) for n, v in state.items()})


def canonical_name(name: str) -> str:
    return "smear.gate" if name == "smear_gate" else name


def split_banks(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PR 1182's banks [layers * parts, out, in] as one matrix per layer; everything else unchanged."""
    result: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        parts = _BANKS.get(name)
        if parts is None:
            result[name] = value
            continue
        if value.ndim != 3 or len(value) % len(parts):
            raise GolfError(f"{name}: shape {value.shape} is not a bank of {len(parts)} matrices per layer")
        for part, stack in zip(parts, np.split(value, len(parts)), strict=True):
            result |= {f"blocks.{i}.{part}": w for i, w in enumerate(stack)}
    return result


def unshuffle_bytes(data: bytes) -> bytes:
    """Inverse of PR 2005's byte shuffle: 'BSHF', the stride, then every stride-th byte from offset 0, 1, ...; else unchanged."""
    if data[:4] != b"BSHF" or len(data) < 5 or data[4] == 0:
        return data
    stride, body = data[4], np.frombuffer(data, np.uint8, offset=5)
    out, start = np.empty_like(body), 0
    for offset in range(stride):
        plane = out[offset::stride]
        plane[:] = body[start : start + len(plane)]
        start += len(plane)
    return out.tobytes()


def _decompress(packing: str, data: bytes, where: str) -> bytes:
    try:
        if packing == "zstd":
            complete = zstandard.get_frame_parameters(data).content_size <= MAX_RAW_BYTES
            raw = zstandard.ZstdDecompressor().decompress(data) if complete else b""
        elif packing == "xz":
            decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MAX_RAW_BYTES)
            raw = decoder.decompress(data, max_length=MAX_RAW_BYTES)
            complete = decoder.eof
        else:
            decoder = brotli.Decompressor()
            raw = decoder.process(data, output_buffer_limit=MAX_RAW_BYTES)
            complete = decoder.is_finished()
    except (zstandard.ZstdError, lzma.LZMAError, brotli.error) as e:
        raise GolfError(f"{where}: not a whole {packing} stream ({e})") from None
    if not complete:
        raise GolfError(f"{where}: the {packing} stream is cut short or larger than {MAX_RAW_BYTES} bytes")
    return unshuffle_bytes(raw) if packing == "brotli" else raw


def _torch_load(source: Any, where: str) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise GolfError(f"{where}: reading PyTorch files needs torch; install the extra: pip install 'golf-jax[torch]'") from None
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError, IndexError) as e:
        raise GolfError(f"{where}: not a torch file that holds only tensors ({str(e).splitlines()[0] if str(e) else e!r})") from None


def _numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as numpy; bfloat16 through its bits."""
    tensor = tensor.detach().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch  # pyright: ignore[reportMissingImports]

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _codes_of_372(stored: Any) -> dict[str, QTensor]:
    result = {}
    for name, codes in stored["quantized"].items():
        kind = re.search(r"int\d", stored["qmeta"][name]["scheme"])  # int8 is called just "per_row" there
        result[name] = QTensor(kind[0] if kind else "int8", "float32", codes=_numpy(codes), scale=_numpy(stored["scales"][name]))
    for name, values in stored["passthrough"].items():
        result[name] = _values(values)
    return result


def _codes_of_w_and_m(stored: Any) -> dict[str, QTensor]:
    result = {}
    for name, meta in stored["m"].items():
        kind = re.search(r"int\d", meta["type"] if isinstance(meta, Mapping) else meta)
        if kind:
            codes, scale = _numpy(stored["w"][name + ".q"]), _numpy(stored["w"][name + ".scale"])
            result[name] = QTensor(kind[0], "float32", codes=codes, scale=scale)
        else:
            result[name] = _values(stored["w"][name])
    return result


def _values(tensor: Any) -> QTensor:
    values = _numpy(tensor)
    return QTensor(values.dtype.name, "float32", values=values)

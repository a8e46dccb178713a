"""Reading what PyTorch scripts write: packed `.ptz` artifacts and checkpoints (`.pt`, `.safetensors`), in the forms people have them.

Pickles are opened only through `torch.load(weights_only=True)`, which builds tensors and plain containers and nothing else; torch
comes with the extra `golf-jax[torch]`, and `.safetensors` needs neither. Names are canonical: prefixes of wrappers taken off,
smear.gate in every recipe, banks split into layers. Whatever is wrong with a file is one GolfError.
"""

import io
import lzma
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import ml_dtypes
import numpy as np
import zstandard

from golf_jax.config import GolfError
from golf_jax.files import refuse_pointer
from golf_jax.interop import pgrp
from golf_jax.interop.safetensors import read_safetensors
from golf_jax.processes import say_once
from golf_jax.quant import QTensor, dequantize_all

MAX_RAW_BYTES = 1 << 30
FREE_BYTES, BYTES_PER_BYTE = 1 << 26, 64  # a file of n bytes may unpack to 64 MiB + 64 n: a small one can never cost gigabytes
FREE_SHARED = 1 << 20  # beside twice what is stored: a tied head is the token table under a second name
DIRECTORY = 0x10  # attribute of a zip entry, as MS-DOS had it
NESTED = ("model", "model_state_dict", "state_dict")
WRAPPERS = {"model", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
BANKS = {
    "qo_bank": ("attn.c_q.weight", "attn.proj.weight"),
    "kv_bank": ("attn.c_k.weight", "attn.c_v.weight"),
    "mlp_up_bank": ("mlp.fc.weight",),
    "mlp_down_bank": ("mlp.proj.weight",),
}
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def read_packed(data: bytes) -> dict[str, np.ndarray]:
    """The dequantized weights, float32 by canonical name, of a `.ptz` file that one of the records' scripts wrote."""
    return dequantize_all(read_packed_codes(data))


def read_packed_codes(data: bytes) -> dict[str, QTensor]:
    """The codes, scales and pass-through values in such a file. Raises GolfError for anything that is not one.

    The packing is told by the bytes: zstd, xz or zlib (what the scripts write where a library is missing), else brotli.
    """
    where = "packed file"
    if data[:4] == pgrp.MAGIC:
        return _codes_of_2135(data)
    stored = _layout(_decompress(data, where), where)
    try:
        read = _codes_of_372 if "quantized" in stored else _codes_of_w_and_m
        return {canonical_name(n): q for n, q in read(stored).items()}
    except GolfError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as e:  # of tensors where dictionaries or text should be
        raise GolfError(f"{where}: not a layout that the records' scripts write ({type(e).__name__}: {e})") from None


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a `.pt` or `.safetensors` checkpoint, float32 or bfloat16, by canonical name with banks split.

    A state_dict may lie under `model`, `model_state_dict` or `state_dict`, names may carry what wrappers put into them (`_orig_mod.`,
    `module.`, FSDP's), float16 and float64 become float32, and an `lm_head.weight` equal to the token table is taken for tied.
    """
    path = Path(path)
    if not path.is_file():
        raise GolfError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        arrays = read_safetensors(path)
    else:
        with path.open("rb") as file:
            refuse_pointer(path, head := file.read(64))
            zipped = head[:4] == b"PK\3\4"
            file.seek(-min(22, path.stat().st_size), 2)
            if zipped and file.read(4) != b"PK\5\6":  # the last record of a zip without a comment, as torch writes it
                raise GolfError(f"{path}: is cut off, or has bytes behind its end")
        state = _state_dict(_torch_load(path, str(path)), path)
        _check_shared(state.values(), path.stat().st_size, str(path))
        arrays = {n: _numpy(v, f"{path}: {n}", _DTYPES) for n, v in state.items()}
    return canonical_state(arrays, str(path))


def _state_dict(stored: Any, path: Path) -> Mapping[str, Any]:
    for _ in range(2):
        if isinstance(stored, Mapping) and (key := next((k for k in NESTED if isinstance(stored.get(k), Mapping)), None)):
            stored, outer = stored[key], stored
            for other, tensors in outer.items():
                if other != key and isinstance(tensors, Mapping) and tensors.keys() == stored.keys():  # an average, most often
                    say_once(f"{path}: the weights under {key!r} are read; those under {other!r} are not")
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(n, str) and hasattr(v, "dtype") for n, v in stored.items()):
        found = f"keys {', '.join(map(str, list(stored)[:6]))}" if isinstance(stored, Mapping) else f"a {type(stored).__name__}"
        raise GolfError(f"{path}: not a state_dict of tensors, nor one under {', '.join(NESTED)}; found {found}")
    return stored


def canonical_state(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Tensors by canonical name: wrappers' parts off, banks split, a tied head dropped; float32 or bfloat16."""
    names = {n: ".".join(part for part in n.split(".") if part not in WRAPPERS) for n in tensors}
    if len(set(names.values())) < len(names):
        found = sorted({part for n in names for part in n.split(".")} & WRAPPERS)
        raise GolfError(f"{where}: without the wrappers' {', '.join(found)} several tensors have the same name; save the inner model's")
    tensors = {names[n]: x for n, x in tensors.items()}
    tensors = {canonical_name(n): x if x.dtype.name == "bfloat16" else x.astype(np.float32) for n, x in tensors.items()}
    head, table = tensors.get("lm_head.weight"), tensors.get("tok_emb.weight")
    if head is not None and table is not None:
        if head.shape != table.shape or not np.array_equal(head, table):
            raise GolfError(f"{where}: lm_head.weight differs from tok_emb.weight, and an untied head is not implemented")
        del tensors["lm_head.weight"]
    return split_banks(tensors)


def canonical_name(name: str) -> str:
    return "smear.gate" if name == "smear_gate" else name


def split_banks(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PR 1182's banks [layers * parts, out, in] as one matrix per layer; everything else unchanged."""
    result: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        parts = BANKS.get(name)
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


def _decompress(data: bytes, where: str) -> bytes:
    """The raw bytes of a whole stream; cut short, too large or followed by more bytes is refused."""
    magic = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zX": "xz", b"\x78": "zlib"}
    packing = next((name for start, name in magic.items() if data.startswith(start)), "brotli")
    rest, limit = b"", min(MAX_RAW_BYTES, raw_limit(len(data)))
    try:
        if packing == "zstd":
            decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            complete = zstandard.get_frame_parameters(data).content_size <= limit
            raw = decoder.decompress(data) if complete else b""
            complete, rest = complete and decoder.eof, decoder.unused_data
        elif packing in ("xz", "zlib"):
            decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MAX_RAW_BYTES) if packing == "xz" else zlib.decompressobj()
            raw = decoder.decompress(data, limit)
            complete, rest = decoder.eof, decoder.unused_data
        else:
            decoder = brotli.Decompressor()
            raw = decoder.process(data, output_buffer_limit=limit)
            complete = decoder.is_finished()
    except (zstandard.ZstdError, lzma.LZMAError, zlib.error, brotli.error) as e:
        raise GolfError(f"{where}: not a whole {packing} stream ({e})") from None
    if not complete:
        raise GolfError(f"{where}: the {packing} stream is cut short, or larger than the {limit:,} bytes that are read of {len(data):,}")
    if rest:
        raise GolfError(f"{where}: {len(rest)} bytes behind the {packing} stream: not the file that a script wrote")
    return unshuffle_bytes(raw)


def raw_limit(stored: int) -> int:
    """Bytes that are unpacked of a file of `stored` bytes, at most; also of the arrays of a reference set."""
    return FREE_BYTES + BYTES_PER_BYTE * stored


def _layout(raw: bytes, where: str) -> Any:
    """What a script put into a packed file: dictionaries of tensors, and of facts about them."""
    stored = _torch_load(io.BytesIO(raw), where)
    if not isinstance(stored, Mapping):
        raise GolfError(f"{where}: not a layout that the records' scripts write (a {type(stored).__name__}, no dictionary)")
    groups = [group for group in stored.values() if isinstance(group, Mapping)]
    _check_shared((x for group in groups for x in group.values()), len(raw), where)
    return stored


def _check_shared(tensors: Iterable[Any], size: int, where: str) -> None:
    """GolfError where tensors under many names share what `size` stored bytes hold once: a few kB would become gigabytes."""
    dense = [x for x in tensors if hasattr(x, "untyped_storage") and str(x.layout) == "torch.strided" and x.device.type != "meta"]
    claimed = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in dense)  # what is expanded is refused by itself
    if claimed > 2 * size + FREE_SHARED:
        raise GolfError(
            f"{where}: its {len(dense)} tensors claim {claimed:,} bytes of a file of {size:,}: many share one storage; save each"
        )


def _torch_load(source: Any, where: str) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise pgrp.NotInstalled(f"{where}: reading PyTorch files needs torch; install the extra: pip install 'golf-jax[torch]'") from None
    try:
        _check_zip(source, where)
        if isinstance(source, io.BytesIO):
            source.seek(0)  # the check has read to its end
        return torch.load(source, map_location="cpu", weights_only=True)
    except GolfError:
        raise
    except pickle.UnpicklingError:  # torch's own advice is to run whatever code the file holds
        raise GolfError(
            f"{where}: not a torch file that holds only tensors: no pickle, or one that asks for code; save model.state_dict()"
        ) from None
    except MemoryError:
        raise GolfError(f"{where}: claims more memory than there is") from None
    except Exception as e:  # damage of zip, pickle and storages raises a dozen types
        raise GolfError(f"{where}: not a torch file that holds only tensors ({type(e).__name__})") from None


def _check_zip(source: Any, where: str) -> None:
    """GolfError for what torch does not look at: a checksum that differs, an entry that stands there twice."""
    if not zipfile.is_zipfile(source):  # the layout before torch 1.6, which has no checksums
        return
    with zipfile.ZipFile(source) as z:
        entries = z.infolist()
        if odd := next((e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED), ""):  # it may be any size
            raise GolfError(f"{where}: {odd!a} is compressed, as torch writes none; save it with torch.save")
        if odd := next((e.filename for e in entries if e.is_dir() or e.external_attr & DIRECTORY), ""):
            raise GolfError(f"{where}: damaged: {odd!a} is marked as a directory, of which torch reads nothing; fetch or save it again")
        if len({e.filename for e in entries}) < len(entries):
            raise GolfError(f"{where}: two of its entries have the same name; save it with torch.save")
        try:
            wrong = z.testzip()
        except zipfile.BadZipFile as error:
            wrong = str(error)
    if wrong:
        raise GolfError(f"{where}: damaged: {wrong!a} is not what its checksum was taken of; fetch or save it again")


def _numpy(tensor: Any, where: str = "tensor", dtypes: tuple[str, ...] = (*_DTYPES, "int8", "uint8")) -> np.ndarray:
    """A dense torch tensor as numpy; bfloat16 through its bits. Raises GolfError for quantized, sparse and meta ones, and other dtypes."""
    import torch  # pyright: ignore[reportMissingImports]

    dtype = str(tensor.dtype).removeprefix("torch.")
    if str(tensor.layout) != "torch.strided" or tensor.device.type == "meta" or dtype not in dtypes:
        kind = f"{str(tensor.layout).removeprefix('torch.')} tensor of {dtype} on {tensor.device.type}"
        raise GolfError(f"{where}: a {kind} cannot be read; save a dense tensor of {', '.join(_DTYPES)}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # some kB can claim terabytes
        raise GolfError(f"{where}: shape {tuple(tensor.shape)} repeats fewer stored values (expand); save a dense tensor")
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if dtype == "bfloat16":
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _codes_of_372(stored: Any) -> dict[str, QTensor]:
    result = {}
    for name, codes in stored["quantized"].items():
        kind = re.search(r"int\d", stored["qmeta"][name]["scheme"])  # int8 is called just "per_row" there
        result[name] = _coded(name, kind[0] if kind else "int8", _numpy(codes), _numpy(stored["scales"][name]))
    for name, values in stored["passthrough"].items():
        result[name] = _values(values)
    return result


def _codes_of_w_and_m(stored: Any) -> dict[str, QTensor]:
    result = {}
    for name, meta in stored["m"].items():
        kind = re.search(r"int\d", meta["type"] if isinstance(meta, Mapping) else meta)
        if kind:
            result[name] = _coded(name, kind[0], _numpy(stored["w"][name + ".q"]), _numpy(stored["w"][name + ".scale"]))
        else:
            result[name] = _values(stored["w"][name])
    return result


def _codes_of_2135(data: bytes) -> dict[str, QTensor]:
    """PR 2135: codes in a frame of their own (`golf_jax.interop.pgrp`), scales, low-rank factors and floats in a torch file beside."""
    where = "packed file"
    codes, remainder = pgrp.split(data, raw_limit(len(data)))
    stored = _layout(_decompress(remainder, where), where)
    try:
        floats, result = {n: _numpy(x) for n, x in stored["w"].items()}, {}
        for name, kind in stored["m"].items():
            if not (width := re.search(r"int\d", kind)):
                result[name] = _values(stored["w"][name])
                continue
            factors = None
            if "lqer" in kind:
                a, b = (_coded(name, k, floats[f"{name}.lq{x}_a"], floats[f"{name}.lq{x}s_a"].reshape(-1), grouped=True)
                        for k, x in (("int2", "A"), ("int4", "B")))  # fmt: skip
                factors = (a, b)
            coded = _coded(name, width[0], codes.pop(name + ".q"), floats[name + ".scale"])
            result[name] = replace(coded, lowrank=factors)
    except GolfError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as e:
        raise GolfError(f"{where}: not a layout that PR 2135's script writes ({type(e).__name__}: {e})") from None
    if codes:
        raise GolfError(f"{where}: codes without a scale: {', '.join(codes)}")
    return result


def _coded(name: str, kind: str, codes: np.ndarray, scale: np.ndarray, grouped: bool = False) -> QTensor:
    """Codes with a scale for each row or one for all; `grouped`: each for equally many. GolfError for other shapes and types."""
    counts = {1, len(codes)} if codes.ndim else {1}
    fits = 0 < scale.size and codes.size % scale.size == 0 if grouped else scale.size in counts
    if codes.dtype != np.int8 or codes.ndim != 2 or not fits or scale.dtype.kind not in "fV":
        what = f"codes {codes.dtype}{list(codes.shape)} with scales {scale.dtype}{list(scale.shape)}"
        raise GolfError(f"packed file: {name}: {what}; the records' scripts write int8 [R, C] with one for each row")
    return QTensor(kind, "float32", codes=codes, scale=scale)


def _values(tensor: Any) -> QTensor:
    values = _numpy(tensor)
    return QTensor(values.dtype.name, "float32", values=values)

"""The packed files of the five PRs, as their scripts wrote them, read back to the same codes and weights; hostile pickles are refused."""

import io
import lzma
import pickle
import struct
import sys
import zipfile
import zlib

import brotli
import ml_dtypes
import numpy as np
import pytest
import zstandard
from reference_quant import RECIPES, quant_case, stored

from golf_jax.config import GolfError
from golf_jax.interop.packed import read_checkpoint, read_packed, read_packed_codes, unshuffle_bytes
from golf_jax.interop.torch_names import pr_names


def assert_same(found, want):
    assert set(found) == set(want)
    for name, q in want.items():
        for part in ("codes", "scale", "values"):
            x, y = getattr(found[name], part), getattr(q, part)
            assert (x is None) == (y is None), name
            if x is not None:
                np.testing.assert_array_equal(x, y, err_msg=name)
        assert found[name].kind == q.kind, name


@pytest.mark.parametrize("pr", RECIPES)
def test_the_scripts_files_are_read(pr, references):
    pytest.importorskip("torch")
    case = quant_case(pr, references)
    data = case.own["artifact"].tobytes()
    assert_same(read_packed_codes(data), stored(case))
    weights = read_packed(data)
    assert all(w.dtype == np.float32 for w in weights.values())
    for name, want in case.under("dequantized/").items():
        np.testing.assert_array_equal(weights[name], want)


def test_byte_shuffle_is_undone():
    """PR 2005: every byte of a stride together, 'BSHF' and the stride in front."""
    data = bytes(range(11))
    for stride in (1, 2, 3, 4):
        shuffled = b"BSHF" + bytes([stride]) + b"".join(data[i::stride] for i in range(stride))
        assert unshuffle_bytes(shuffled) == data
    assert unshuffle_bytes(data) == data


def test_checkpoints_become_canonical(tmp_path, references):
    torch = pytest.importorskip("torch")
    case = quant_case("pr1182", references)
    want = case.tensors
    state = {n: torch.from_numpy(x) for n, x in pr_names("pr1182", case.model, want).items()}
    state["tok_emb.weight"] = state["tok_emb.weight"].bfloat16()
    state["smear_gate"] = state.pop("smear.gate")
    torch.save(state, tmp_path / "final_model.pt")
    found = read_checkpoint(tmp_path / "final_model.pt")
    assert set(found) == set(want)
    assert found["tok_emb.weight"].dtype == ml_dtypes.bfloat16
    for name in want:
        np.testing.assert_array_equal(found[name], want[name].astype(found[name].dtype))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


class Large:
    def __reduce__(self):
        return bytearray, (10**15,)


def legacy(key: bytes) -> bytes:
    """A file in the layout before torch 1.6 whose list of storages names `key` (pickled) and not that of its tensor."""
    import torch

    out = io.BytesIO()
    torch.save({"w": torch.ones(3)}, out, _use_new_zipfile_serialization=False)
    head, _, keys = out.getvalue().rpartition(pickle.PROTO + b"\x02]")
    length = 5 + int.from_bytes(keys[keys.index(b"X") + 1 :][:4], "little")
    at = keys.index(b"X")
    return head + pickle.PROTO + b"\x02]" + keys[:at] + key + keys[at + length :]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_that_execute_are_refused(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(GolfError, match="only tensors"):
        read_checkpoint(tmp_path / "evil.pt")
    with pytest.raises(GolfError, match="only tensors"):
        read_packed(zstandard.compress(pickle.dumps({"w": Evil(), "m": {}})))


def test_wrong_files_are_named(tmp_path, references):
    torch = pytest.importorskip("torch")
    artifact = quant_case("pr638", references).own["artifact"].tobytes()
    other = io.BytesIO()
    torch.save({"x": 1}, other)
    for data, message in [
        (b"nonsense", "brotli"),
        (artifact[:-100], "zstd"),
        (artifact + b"more", "4 bytes behind the zstd stream"),
        (zstandard.compress(other.getvalue()), "not a layout"),
        (zstandard.compress(pickle.dumps(Large(), 2)), "claims more memory than there is"),
        (zstandard.compress(legacy(b"X\x01\x00\x00\x00" + b"9")), "only tensors .AssertionError"),
    ]:
        with pytest.raises(GolfError, match=message):
            read_packed(data)
    with pytest.raises(GolfError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
    torch.save({"step": 3}, tmp_path / "other.pt")
    with pytest.raises(GolfError, match="not a state_dict"):
        read_checkpoint(tmp_path / "other.pt")


def test_without_torch_the_extra_is_named(references, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(GolfError, match=r"golf-jax\[torch\]"):
        read_packed(quant_case("pr638", references).own["artifact"].tobytes())


def saved(tmp_path, state, name="final_model.pt"):
    import torch

    torch.save(state, tmp_path / name)
    return tmp_path / name


def test_checkpoints_come_in_many_forms(tmp_path):
    """Wrappers' prefixes, nested dictionaries, a tied head and any float dtype give the same weights."""
    torch = pytest.importorskip("torch")
    state = {"tok_emb.weight": torch.arange(12.0).reshape(4, 3), "smear.gate": torch.ones(3)}
    forms = [
        {f"_orig_mod.{n}": t for n, t in state.items()},
        {f"module._orig_mod.{n}": t for n, t in state.items()},
        {f"model._fsdp_wrapped_module.{n}": t for n, t in state.items()},
        {"model": state, "step": 3},
        {"model_state_dict": {f"module.{n}": t for n, t in state.items()}, "optimizer": {}},
        {"state_dict": state},
        state | {"lm_head.weight": state["tok_emb.weight"].clone()},
        {n: t.half() for n, t in state.items()},
        {n: t.double() for n, t in state.items()},
    ]
    for form in forms:
        found = read_checkpoint(saved(tmp_path, form))
        assert set(found) == set(state) and all(x.dtype == np.float32 for x in found.values())
        np.testing.assert_array_equal(found["tok_emb.weight"], np.arange(12).reshape(4, 3))
    whole = saved(tmp_path, state).read_bytes()
    for name, data in (("trailing", whole + b"x"), ("cut", whole[:-1])):
        (tmp_path / f"{name}.pt").write_bytes(data)
        with pytest.raises(GolfError, match=rf"{name}\.pt: is cut off, or has bytes behind its end"):
            read_checkpoint(tmp_path / f"{name}.pt")
    with pytest.raises(GolfError, match="untied head"):
        read_checkpoint(saved(tmp_path, state | {"lm_head.weight": torch.zeros(4, 3)}))


def test_weights_of_the_same_names_that_are_not_read_are_told(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    file = saved(tmp_path, {"ema": {"w": torch.zeros(2)}, "model": {"w": torch.ones(2)}, "optimizer": {"v": torch.ones(2)}})
    assert read_checkpoint(file)["w"].all()
    assert capsys.readouterr().err == f"{file}: the weights under 'model' are read; those under 'ema' are not\n"


def test_exotic_tensors_are_one_line(tmp_path):
    torch = pytest.importorskip("torch")
    w = torch.ones(4, 4)
    for tensor in (w.to(torch.float8_e4m3fn), w.to_sparse(), w.to("meta"), w.to(torch.int8)):
        with pytest.raises(GolfError, match="cannot be read") as error:
            read_checkpoint(saved(tmp_path, {"w": tensor}))
        assert "\n" not in str(error.value)
    with pytest.raises(GolfError, match="repeats fewer stored values"):  # 4 TB from a file of 1 kB
        read_checkpoint(saved(tmp_path, {"w": torch.zeros(1, 1).expand(10**7, 10**5)}))
    with pytest.raises(GolfError, match="not a state_dict"):
        read_checkpoint(saved(tmp_path, {0: w}))


def test_a_small_file_costs_little_however_much_it_claims(tmp_path):
    """Streams of nothing but zeros in every packing, codes behind them, one storage under a thousand names."""
    torch = pytest.importorskip("torch")
    zeros = bytes(100_000_000)
    for packed in (brotli.compress(zeros, quality=5), zlib.compress(zeros), lzma.compress(zeros, preset=1), zstandard.compress(zeros)):
        with pytest.raises(GolfError, match="cut short, or larger than the [0-9,]+ bytes that are read of"):
            read_packed(packed)
    order = struct.pack("<II", 16384, 16384) + np.arange(16384, dtype="<u2").tobytes()
    frame = b"PGRP" + struct.pack("<IIH", 2, 1, 1) + b"a" + order + struct.pack("<BI", 0, 4) + b"1234" + struct.pack("<I", 0)
    with pytest.raises(GolfError, match="claims 268,435,456 codes; at most"):
        read_packed(frame)
    w = torch.ones(100, 1000)
    for shared in (w, w.t(), w.half()):
        with pytest.raises(GolfError, match="its 1000 tensors claim [0-9,]+ bytes of a file of [0-9,]+: many share one storage"):
            read_checkpoint(saved(tmp_path, {f"w{i}": shared for i in range(1000)}))
    out = io.BytesIO()
    torch.save({"w": {f"w{i}": w for i in range(1000)}, "m": {f"w{i}": "float32" for i in range(1000)}}, out)
    with pytest.raises(GolfError, match="packed file: its 1000 tensors claim 400,000,000 bytes"):
        read_packed(zstandard.compress(out.getvalue()))
    assert len(read_checkpoint(saved(tmp_path, {"tok_emb.weight": w, "lm_head.weight": w, "x": w[:50]}))) == 2  # tied: one storage


def test_the_layout_before_torch_1_6_is_read_in_packed_files_too():
    torch = pytest.importorskip("torch")
    out = io.BytesIO()
    torch.save({"w": {"v": torch.arange(3.0)}, "m": {"v": "passthrough"}}, out, _use_new_zipfile_serialization=False)
    assert read_packed(zstandard.compress(out.getvalue()))["v"].tolist() == [0, 1, 2]


def test_views_of_all_kinds_are_read_as_their_values(tmp_path):
    torch = pytest.importorskip("torch")
    w = torch.arange(16.0).view(4, 4)
    for view in (w.t().contiguous().t(), torch.stack([w, -w], -1)[..., 0], torch._neg_view(-w), torch.cat([w, w]).view(2, 4, 4)[1]):
        np.testing.assert_array_equal(read_checkpoint(saved(tmp_path, {"w": view}))["w"], w.numpy())


def test_one_bit_that_makes_a_record_a_directory_is_found(tmp_path):
    """torch reads nothing then and leaves whatever was in memory, and all checksums hold."""
    torch = pytest.importorskip("torch")
    path = saved(tmp_path, {"w": torch.arange(1.0, 65.0)})
    data = bytearray(path.read_bytes())
    at = data.index(b"/data/0", data.index(b"PK\1\2"))
    attributes = data.rindex(b"PK\1\2", 0, at) + 38
    data[attributes] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(GolfError, match="data/0' is marked as a directory, of which torch reads nothing"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_packed_files_of_other_layouts_are_one_line():
    torch = pytest.importorskip("torch")
    q, s = torch.zeros(6, 4, dtype=torch.int8), torch.ones(6)
    for layout, message in [
        (q, "a Tensor, no dictionary"),
        ({"quantized": q, "scales": {}}, "not a layout"),
        ({"w": {"a.q": q, "a.scale": s}, "m": q}, "not a layout"),
        ({"quantized": {"a": q}, "scales": {"a": s}, "qmeta": {"a": q}, "passthrough": {}}, "not a layout"),
        ({"w": {"a.q": q, "a.scale": s[:4]}, "m": {"a": "int6"}}, r"a: codes int8\[6, 4\] with scales float32\[4\]; the records"),
        ({"w": {"a.q": q[0], "a.scale": s[:1]}, "m": {"a": "int6"}}, r"a: codes int8\[4\] with scales"),
        ({"w": {"a.q": q.float(), "a.scale": s}, "m": {"a": "int6"}}, r"a: codes float32\[6, 4\] with"),
        ({"w": {"a.q": q, "a.scale": q[:, 0]}, "m": {"a": "int6"}}, r"with scales int8\[6\]"),
    ]:
        out = io.BytesIO()
        torch.save(layout, out)
        with pytest.raises(GolfError, match=message):
            read_packed(zstandard.compress(out.getvalue()))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_torch_does_not_look_at_is_compared(tmp_path):
    """Checksums of the zip, entries of one name, compressed ones; in packed files as well, whose streams may have no checksum."""
    torch = pytest.importorskip("torch")
    path = saved(tmp_path, {"w": torch.arange(64.0)})
    data = path.read_bytes()
    at = data.index(torch.arange(64.0).numpy().tobytes())
    flipped = data[: at + 6] + bytes([data[at + 6] ^ 64]) + data[at + 7 :]
    with (
        zipfile.ZipFile(path) as z,
        zipfile.ZipFile(tmp_path / "twice.pt", "w") as twice,
        zipfile.ZipFile(tmp_path / "z.pt", "w", 8) as packed,
    ):
        for name in [*z.namelist(), z.namelist()[-1]]:
            twice.writestr(name, z.read(name))
        for name in z.namelist():
            packed.writestr(name, z.read(name))
    path.write_bytes(flipped)
    for file, what in (
        (path, "damaged: .*data/0' is not what its checksum"),
        (tmp_path / "twice.pt", "the same name"),
        (tmp_path / "z.pt", "is compressed"),
    ):
        with pytest.raises(GolfError, match=what):
            read_checkpoint(file)
    with pytest.raises(GolfError, match="packed file: damaged"):
        read_packed_codes(zstandard.compress(flipped))


def test_packings_that_scripts_fall_back_to(references):
    pytest.importorskip("torch")
    data = quant_case("pr638", references).own["artifact"].tobytes()
    raw = zstandard.decompress(data)
    for packed in (zlib.compress(raw), lzma.compress(raw)):
        assert_same(read_packed_codes(packed), read_packed_codes(data))


def test_torchs_advice_to_run_code_is_not_passed_on(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(GolfError) as error:
        read_checkpoint(tmp_path / "evil.pt")
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)

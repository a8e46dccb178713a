"""The packed files of the five PRs, as their scripts wrote them, read back to the same codes and weights; hostile pickles are refused."""

import io
import lzma
import pickle
import sys
import zlib

import ml_dtypes
import numpy as np
import pytest
import zstandard
from golden_quant import RECIPES, portable_codes, reference_codes, reference_tensors

from golf_jax.config import GolfError
from golf_jax.interop.packed import read_checkpoint, read_packed, read_packed_codes, unshuffle_bytes
from golf_jax.quant import dequantize


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
def test_portable_artifacts(pr, golden):
    pytest.importorskip("torch")
    z = np.load(golden / f"{pr}.npz")
    data = z["artifact"].tobytes()
    found, want = read_packed_codes(data), portable_codes(pr, z)
    assert_same(found, want)
    weights = read_packed(data)
    assert all(w.dtype == np.float32 for w in weights.values())
    for key in z.files:
        if key.startswith("dequant/"):
            np.testing.assert_array_equal(weights[key[8:].replace("smear_gate", "smear.gate")], z[key])


@pytest.mark.parametrize("pr", RECIPES)
def test_shared_artifacts(pr, shared):
    pytest.importorskip("torch")
    z = np.load(shared / "golden" / pr / "quant.npz")
    root = "small_thr/" if pr == "pr1182" else ""
    want = reference_codes(pr, z, root)
    assert_same(read_packed_codes(z[root + "artifact"].tobytes()), want)
    weights = read_packed(z[root + "artifact"].tobytes())
    np.testing.assert_array_equal(weights["skip_weights"], dequantize(want["skip_weights"]))


@pytest.mark.parametrize("i", range(4))
def test_byte_shuffle_of_pr2005(i, shared):
    z = np.load(shared / "golden" / "pr2005" / "quant.npz")
    assert unshuffle_bytes(z[f"shuffle{i}/out"].tobytes()) == z[f"shuffle{i}/in"].tobytes()


def test_checkpoints_become_canonical(tmp_path, golden):
    torch = pytest.importorskip("torch")
    z = np.load(golden / "pr1182.npz")
    state = {k[6:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("param/")}
    state["tok_emb.weight"] = state["tok_emb.weight"].bfloat16()
    state["smear_gate"] = state.pop("smear.gate")
    torch.save(state, tmp_path / "final_model.pt")
    found, want = read_checkpoint(tmp_path / "final_model.pt"), reference_tensors("pr1182", z)
    assert set(found) == set(want)
    assert found["tok_emb.weight"].dtype == ml_dtypes.bfloat16
    for name in want:
        np.testing.assert_array_equal(found[name], want[name].astype(found[name].dtype))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_that_execute_are_refused(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(GolfError, match="only tensors"):
        read_checkpoint(tmp_path / "evil.pt")
    with pytest.raises(GolfError, match="only tensors"):
        read_packed(zstandard.compress(pickle.dumps({"w": Evil(), "m": {}})))


def test_wrong_files_are_named(tmp_path, golden):
    torch = pytest.importorskip("torch")
    artifact = np.load(golden / "pr638.npz")["artifact"].tobytes()
    other = io.BytesIO()
    torch.save({"x": 1}, other)
    for data, message in [
        (b"nonsense", "brotli"),
        (artifact[:-100], "zstd"),
        (artifact + b"more", "4 bytes behind the zstd stream"),
        (zstandard.compress(other.getvalue()), "not a layout"),
    ]:
        with pytest.raises(GolfError, match=message):
            read_packed(data)
    with pytest.raises(GolfError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
    torch.save({"step": 3}, tmp_path / "other.pt")
    with pytest.raises(GolfError, match="not a state_dict"):
        read_checkpoint(tmp_path / "other.pt")


def test_without_torch_the_extra_is_named(golden, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(GolfError, match=r"golf-jax\[torch\]"):
        read_packed(np.load(golden / "pr638.npz")["artifact"].tobytes())


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
    with pytest.raises(GolfError, match="untied head"):
        read_checkpoint(saved(tmp_path, state | {"lm_head.weight": torch.zeros(4, 3)}))


def test_exotic_tensors_are_one_line(tmp_path):
    torch = pytest.importorskip("torch")
    w = torch.ones(4, 4)
    for tensor in (w.to(torch.float8_e4m3fn), w.to_sparse(), w.to("meta")):
        with pytest.raises(GolfError, match="cannot be read") as error:
            read_checkpoint(saved(tmp_path, {"w": tensor}))
        assert "\n" not in str(error.value)


def test_packings_that_scripts_fall_back_to(golden):
    pytest.importorskip("torch")
    data = np.load(golden / "pr638.npz")["artifact"].tobytes()
    raw = zstandard.decompress(data)
    for packed in (zlib.compress(raw), lzma.compress(raw)):
        assert_same(read_packed_codes(packed), read_packed_codes(data))


def test_torchs_advice_to_run_code_is_not_passed_on(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(GolfError) as error:
        read_checkpoint(tmp_path / "evil.pt")
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)

"""The packed files of the five PRs, as their scripts wrote them, read back to the same codes and weights; hostile pickles are refused."""

import io
import pickle
import sys

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
    found, want = read_packed_codes(pr, data), portable_codes(pr, z)
    assert_same(found, want)
    weights = read_packed(pr, data)
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
    assert_same(read_packed_codes(pr, z[root + "artifact"].tobytes()), want)
    weights = read_packed(pr, z[root + "artifact"].tobytes())
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
        read_packed("pr638", zstandard.compress(pickle.dumps({"w": Evil(), "m": {}})))


def test_wrong_files_are_named(tmp_path, golden):
    torch = pytest.importorskip("torch")
    artifact = np.load(golden / "pr638.npz")["artifact"].tobytes()
    other = io.BytesIO()
    torch.save({"x": 1}, other)
    for recipe, data, message in [
        ("pr9", b"", "no packed format known"),
        ("pr638", b"nonsense", "not a whole zstd"),
        ("pr1182", artifact, "not a whole xz"),
        ("pr2005", artifact, "brotli"),
        ("pr638", artifact[:-100], "zstd"),
        ("pr372", artifact, "not the layout"),
        ("pr638", zstandard.compress(other.getvalue()), "not the layout"),
    ]:
        with pytest.raises(GolfError, match=message):
            read_packed(recipe, data)
    with pytest.raises(GolfError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
    torch.save({"step": 3}, tmp_path / "other.pt")
    with pytest.raises(GolfError, match="not a state_dict"):
        read_checkpoint(tmp_path / "other.pt")


def test_without_torch_the_extra_is_named(golden, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(GolfError, match=r"golf-jax\[torch\]"):
        read_packed("pr638", np.load(golden / "pr638.npz")["artifact"].tobytes())

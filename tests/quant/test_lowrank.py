"""Low-rank corrections: as the record packs them (up to the signs of singular pairs), and from the container again."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from golf_jax.artifact.codecs import ArtifactError
from golf_jax.artifact.container import pack as pack_file
from golf_jax.artifact.container import unpack
from golf_jax.artifact.ledger import ledger
from golf_jax.config import GolfError, LowRankConfig, QuantConfig, QuantRule
from golf_jax.quant import QTensor, dequantize, quantize
from golf_jax.quant.lowrank import low_rank, pack, residual_norm
from golf_jax.quant.schemes import coded_values

SET = np.load(Path(__file__).parents[1] / "reference/pr2135_eval.npz")
CASES = json.loads(str(SET["reference"]))["sections"]["units"]["cases"]


@pytest.mark.parametrize("case", ["lqer_wide", "lqer_tall", "lqer_group16", "lqer_symmetric"])
def test_factors_and_codes_are_the_records_up_to_signs(case):
    out = {k.split("/out/")[1]: SET[k] for k in SET.files if k.startswith(f"units/{case}/out/")}
    a_RK, b_KC = low_rank(SET[f"units/{case}/in/e"], CASES[case]["rank"])
    sign_K = np.sign((a_RK * out["a_float"]).sum(0)).astype(np.float32)
    a_RK, b_KC = a_RK * sign_K, b_KC * sign_K[:, None]
    np.testing.assert_allclose(a_RK, out["a_float"], atol=1e-5 * np.abs(out["a_float"]).max())
    np.testing.assert_allclose(b_KC, out["b_float"], atol=1e-5)
    a, b = pack(a_RK, b_KC, CASES[case]["group"])
    for ours, name in ((a, "a"), (b, "b")):
        assert (ours.codes != out[name]).mean() <= 0.01
        np.testing.assert_allclose(ours.scale, out[f"{name}_scale"].reshape(-1), rtol=1e-3)


def test_the_sign_convention_is_a_function_of_the_matrix():
    e_RC = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
    a_RK, b_KC = low_rank(e_RC, 3)
    assert (np.take_along_axis(a_RK, np.abs(a_RK).argmax(0)[None], 0) < 0).all()
    flipped = low_rank(-e_RC, 3)
    np.testing.assert_allclose(flipped[0], a_RK, atol=1e-5)
    np.testing.assert_allclose(flipped[1], -b_KC, atol=1e-5)


def made(rank=2, top=2):
    rng = np.random.default_rng(1)
    tensors = {f"blocks.{i}.mlp.fc.weight": (i + 1) * rng.normal(size=(24, 32)).astype(np.float32) for i in range(3)}
    config = QuantConfig(rules=(QuantRule("", "int6_sdclip", sigmas=11.5),), lowrank=LowRankConfig(rank, top, 32))
    return tensors, quantize(tensors, config)


def test_the_largest_residuals_are_corrected_and_come_nearer():
    tensors, quantized = made()
    assert [n[7] for n, q in quantized.items() if q.lowrank] == ["1", "2"]
    for name, q in quantized.items():
        plain = residual_norm(tensors[name] - coded_values(q))
        assert (residual_norm(tensors[name] - dequantize(q)) < plain) == bool(q.lowrank)


@pytest.mark.parametrize("compressor", ["zstd", "rans"])
def test_corrections_and_group_scales_go_through_the_container(compressor):
    _, quantized = made()
    grouped = QTensor("int4", "float32", codes=np.ones((4, 8), np.int8), scale=np.arange(16, dtype=np.float16))
    tensors = quantized | {"tok_emb.weight": grouped}
    data = pack_file({}, tensors, compressor, 5)
    _, back = unpack(data)
    assert list(back) == list(tensors)
    for name, q in tensors.items():
        assert np.array_equal(dequantize(q), dequantize(back[name])), name
    assert any("lowrank_a" in line.label for line in ledger(data).lines)


def test_half_a_correction_is_refused():
    _, quantized = made()
    name = next(n for n, q in quantized.items() if q.lowrank)
    a, b = quantized[name].lowrank
    for broken, why in (({name + ".lowrank_a": a}, "half"), ({name + ".lowrank_a": a, name + ".lowrank_b": a}, "shapes")):
        with pytest.raises(ArtifactError, match=why):
            unpack(pack_file({}, {name: replace(quantized[name], lowrank=None)} | broken, "zstd", 3))


def test_sigmas_are_refused_where_a_scheme_has_none():
    with pytest.raises(GolfError, match="no clip in standard deviations"):
        quantize({"tok_emb.weight": np.ones((2, 2), np.float32)}, QuantConfig(rules=(QuantRule("", "int6_row", sigmas=3.0),)))

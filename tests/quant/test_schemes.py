"""Codes, scales and kinds equal those of the five PRs, bit for bit; wrong input is named."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from golden_quant import (
    PORTABLE_NUMEL,
    PORTABLE_PRUNE_NUMEL,
    RECIPES,
    json_of,
    portable_codes,
    recipe_quant,
    reference_codes,
    reference_tensors,
)

from golf_jax.config import GolfError, QuantConfig, QuantRule
from golf_jax.quant import dequantize, quantize, without_hessians
from golf_jax.quant.rounding import prune_by_magnitude, sorted_rows, torch_quantile
from golf_jax.quant.schemes import SCHEMES

NO_GPTQ = [pr for pr in RECIPES if pr != "pr2005"]


def assert_equal(q, want, name):
    assert q.kind == want.kind, name
    if want.codes is not None:
        np.testing.assert_array_equal(q.codes, want.codes, err_msg=name)
        np.testing.assert_array_equal(q.scale, want.scale, err_msg=name)
    else:
        np.testing.assert_array_equal(q.values, want.values, err_msg=name)
        assert q.values.shape == want.values.shape, name


@pytest.mark.parametrize("pr", NO_GPTQ)
def test_portable_codes_are_equal(pr, golden):
    z = np.load(golden / f"{pr}.npz")
    found = quantize(reference_tensors(pr, z), recipe_quant(pr, PORTABLE_NUMEL[pr], PORTABLE_PRUNE_NUMEL))
    want = portable_codes(pr, z)
    assert set(found) == set(want)
    for name in want:
        assert_equal(found[name], want[name], name)
    for key in z.files:
        if key.startswith("dequant/"):
            name = {"smear_gate": "smear.gate"}.get(key[8:], key[8:]) if pr == "pr372" else key[8:]
            np.testing.assert_array_equal(dequantize(found[name]), z[key], err_msg=name)


@pytest.mark.parametrize(
    "pr, root, numel",
    [("pr372", "", 1024), ("pr562", "", 8192), ("pr638", "", 1024), ("pr1182", "small_thr/", 2047), ("pr1182", "ref_thr/", 65536)],
)
def test_shared_codes_are_equal(pr, root, numel, shared):
    z = np.load(shared / "golden" / pr / "quant.npz")
    tensors = reference_tensors(pr, np.load(shared / "golden" / pr / "model.npz"))
    found = quantize(tensors, recipe_quant(pr, numel))
    want = reference_codes(pr, z, root)
    assert root == "ref_thr/" or set(found) == set(want)
    for name in want:
        assert_equal(found[name], want[name], name)
    for key in z.files:
        if key.startswith(root + "deq/"):
            name = {"smear_gate": "smear.gate"}.get(key.split("/")[-1], key.split("/")[-1]) if pr == "pr372" else key.split("/")[-1]
            np.testing.assert_array_equal(dequantize(found[name]), z[key], err_msg=name)


def test_large_heavy_tailed_matrices_of_pr562(shared):
    """Every clip quantile in play, pruning and the layer-8 key exception, at width 192."""
    z = np.load(shared / "golden" / "pr562" / "quant_large.npz")
    found = quantize(reference_tensors("pr562", z), recipe_quant("pr562", 8192))
    want = reference_codes("pr562", z)
    for name in found:
        assert_equal(found[name], want[name], name)
    names, thresholds, zeroed = (json_of(z, "prune/names"), z["prune/threshold"], z["prune/zeroed"])
    checked = 0
    for name, threshold, count in zip(names, thresholds, zeroed, strict=True):
        if f"param/{name}" in z.files:
            w = z[f"param/{name}"]
            assert torch_quantile(np.sort(np.abs(w), axis=None), 0.03) == np.float32(threshold)
            assert (prune_by_magnitude(w, 0.03) == 0).sum() == count
            checked += 1
    assert checked >= 2


def test_pruning_thresholds_of_pr562(golden):
    z = np.load(golden / "pr562.npz")
    for name, want in json_of(z, "prune_json").items():
        w = z[f"param/{name}"]
        assert torch_quantile(np.sort(np.abs(w), axis=None), 0.03) == np.float32(want["threshold"]), name
        assert (prune_by_magnitude(w, 0.03) == 0).sum() == want["zeroed"], name
    small = quantize({"a": z["param/bigram.proj.weight"]}, recipe_quant("pr562", 128, 192))["a"]
    np.testing.assert_array_equal(small.codes, z["codes/bigram.proj.weight"])  # exactly 192 elements: not pruned


@pytest.mark.parametrize("size", ["w512", "w1536", "e128", "e512"])
def test_real_row_lengths_of_pr1182(size, shared):
    z = np.load(shared / "golden" / "pr1182" / "quant.npz")
    w = z[f"unit/{size}/w"]
    for scheme, tag in (("int6_matrix_search", "int6"), ("int8_percentile", "int8")):
        codes, scale = SCHEMES[scheme].make(w, 1.0, None)
        np.testing.assert_array_equal(codes, z[f"unit/{size}/{tag}_q"])
        np.testing.assert_array_equal(scale, z[f"unit/{size}/{tag}_scale"])
    quantiles = [k for k in z.files if k.startswith(f"unit/{size}/quantile_")]
    assert len(quantiles) == 5
    for key in quantiles:
        np.testing.assert_array_equal(torch_quantile(sorted_rows(w), float(key.split("_")[-1])), z[key])


def test_edge_rows_of_pr638(shared):
    """Row maxima from 1e-6 to 6, a zero row, exact ties; and an embedding kept in bfloat16."""
    z = np.load(shared / "golden" / "pr638" / "quant.npz")
    for scheme, tag in (("int6_row_floor", "int6"), ("int8_percentile", "int8")):
        codes, scale = SCHEMES[scheme].make(z["unit/in"], 1.0, None)
        np.testing.assert_array_equal(codes, z[f"unit/{tag}_q"])
        np.testing.assert_array_equal(scale, z[f"unit/{tag}_scale_fp16"])
    w = z["bf16case/in"].astype(ml_dtypes.bfloat16)
    q = quantize({"tok_emb.weight": w}, recipe_quant("pr638", 1024))["tok_emb.weight"]
    np.testing.assert_array_equal(q.codes, z["bf16case/q"])
    np.testing.assert_array_equal(q.scale, z["bf16case/scale_fp16"])
    back = dequantize(q)
    assert back.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(back.astype(np.float32), z["bf16case/deq"])


@pytest.mark.parametrize("name", ["tok_emb.weight", "bigram.embed.weight"])
def test_int8_clip_of_pr638(name, shared):
    z = np.load(shared / "golden" / "pr638" / "quant.npz")
    w = np.load(shared / "golden" / "pr638" / "model.npz")[f"param/{name}"]
    np.testing.assert_array_equal(torch_quantile(sorted_rows(w), 0.9999984), z[f"int8_clip_abs/{name}"])


FULL_SIZE = {
    "pr372": {"int5": 22, "int6": 43, "int8": 1, "float16": 3, "float32": 47},
    "pr562": {"int5": 20, "int6": 41, "float16": 75},
    "pr638": {"int6": 66, "int8": 2, "float16": 81},
    "pr1182": {"int6": 66, "int8": 4, "float16": 66},
    "pr2005": {"int6": 66, "int7": 1, "float16": 46},
}


@pytest.mark.parametrize("pr", RECIPES)
def test_kind_counts_are_those_of_the_full_run(pr, golden):
    z = np.load(golden / f"{pr}.npz")
    kinds = [str(z[k]) for k in z.files if k.startswith("kind/")]
    assert {k: kinds.count(k) for k in kinds} == FULL_SIZE[pr]


def test_zero_rows_give_zero_weights():
    w = np.zeros((3, 256), np.float32)
    w[1] = np.linspace(-1, 1, 256)
    for name, scheme in SCHEMES.items():
        if scheme.needs_hessian:
            continue
        rules = QuantConfig(rules=(QuantRule("", name),))
        back = dequantize(quantize({"w": w}, rules)["w"])
        assert np.isfinite(back).all() and (back[[0, 2]] == 0).all() and back[1].any(), name


def test_a_larger_step_makes_fewer_distinct_codes():
    w = np.random.default_rng(0).standard_normal((32, 512)).astype(np.float32)
    for name, scheme in SCHEMES.items():
        if scheme.needs_hessian:
            continue
        distinct = [len(np.unique(scheme.make(w, step, None)[0])) for step in (1.0, 1.5, 3.0)]
        assert distinct[0] > distinct[1] > distinct[2], name


def test_the_unreachable_code_of_int5(golden):
    z = np.load(golden / "pr372.npz")
    codes = np.concatenate([z[k].ravel() for k in z.files if k.startswith("codes/") and ".mlp." in k])
    ours, _ = SCHEMES["int5_row"].make(np.random.default_rng(0).standard_normal((64, 1536)).astype(np.float32), 1.0, None)
    assert codes.min() == ours.min() == -15


def test_errors_name_the_tensor_and_the_fix():
    w = np.ones((4, 4), np.float32)

    def rules(scheme):
        return QuantConfig(rules=(QuantRule("", scheme),), gptq_batches=int(scheme.startswith("gptq")))

    cases = [
        ({"a": np.full((4, 4), np.nan, np.float32)}, rules("int6_row"), "a: holds NaN"),
        ({"a": w.astype(np.float64)}, rules("int6_row"), "a: dtype float64"),
        ({"a": w}, rules("int9"), "unknown scheme 'int9'"),
        ({"a": w[0]}, rules("int6_row"), "needs a matrix, but a has shape"),
        ({"a": w}, rules("gptq_int6"), "a: scheme gptq_int6 needs its Hessian"),
        ({"a": w * 1e6}, rules("float16"), "a: a value exceeds float16"),
        ({"a": w * 1e8}, rules("int6_row"), "a: a row scale exceeds float16"),
        ({"a": w}, QuantConfig(rules=(QuantRule("b", "int6_row"),)), "no rule matches a"),
    ]
    for tensors, config, message in cases:
        with pytest.raises(GolfError, match=message):
            quantize(tensors, config)


def test_first_match_wins_and_thresholds_are_inclusive_below():
    rules = (QuantRule("x|y", "float16", max_numel=16), QuantRule("", "int6_row", min_numel=15), QuantRule("", "float32"))
    w = np.ones((4, 4), np.float32)
    tensors = {"ax": w, "b": w, "c": w[:3], "y2": np.ones((4, 5), np.float32)}
    kinds = {n: q.kind for n, q in quantize(tensors, QuantConfig(rules=rules)).items()}
    assert kinds == {"ax": "float16", "b": "int6", "c": "float32", "y2": "int6"}


def test_pr2005_without_hessians_has_its_scales_and_pass_through(golden):
    """Byte estimates while training: plain rounding at the scales that GPTQ will use, codes about the same size."""
    z = np.load(golden / "pr2005.npz")
    found = quantize(reference_tensors("pr2005", z), without_hessians(recipe_quant("pr2005", 192)))
    want = portable_codes("pr2005", z)
    for name, q in found.items():
        assert q.kind == want[name].kind
        if q.codes is None:
            assert_equal(q, want[name], name)
        else:
            np.testing.assert_array_equal(q.scale, want[name].scale)
            assert abs(q.codes.astype(int) - want[name].codes).mean() < 2


def test_step_one_is_the_pr():
    config = recipe_quant("pr638", 16)
    w = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    same = replace(config, rules=tuple(replace(r, step=1.0) for r in config.rules))
    a, b = (quantize({"blocks.0.mlp.fc.weight": w}, c)["blocks.0.mlp.fc.weight"] for c in (config, same))
    np.testing.assert_array_equal(a.codes, b.codes)

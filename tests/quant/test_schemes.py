"""Codes, scales and kinds equal those of the PRs, bit for bit; wrong input is named."""

from dataclasses import replace

import numpy as np
import pytest
from reference_quant import RECIPES, quant_case, rules, stored

from golf_jax.config import GolfError, QuantConfig, QuantRule
from golf_jax.interop.checks.quantization import check_quant
from golf_jax.quant import dequantize, quantize, without_hessians
from golf_jax.quant.schemes import SCHEMES


def assert_equal(q, want, name):
    assert q.kind == want.kind, name
    if want.codes is not None:
        np.testing.assert_array_equal(q.codes, want.codes, err_msg=name)
        np.testing.assert_array_equal(q.scale, want.scale, err_msg=name)
    else:
        np.testing.assert_array_equal(q.values, want.values, err_msg=name)
        assert q.values.shape == want.values.shape, name


@pytest.mark.parametrize("pr", ["pr372", "pr562", "pr638", "pr1182"])
def test_codes_equal_the_records(pr, references):
    """With scales, kinds, dequantized weights, and PR 562's pruning thresholds."""
    case = quant_case(pr, references)
    check_quant(case)
    results = case.results()
    assert sum(r.compared for r in results) > 200
    assert [f"{r.name}: {r.worst}" for r in results if not r.ok] == []


FULL_SIZE = {
    "pr372": {"int5": 22, "int6": 43, "int8": 1, "float16": 3, "float32": 47},
    "pr562": {"int5": 20, "int6": 41, "float16": 75},
    "pr638": {"int6": 66, "int8": 2, "float16": 81},
    "pr1182": {"int6": 66, "int8": 4, "float16": 66},
    "pr2005": {"int6": 66, "int7": 1, "float16": 46},
}


@pytest.mark.parametrize("pr", RECIPES)
def test_kind_counts_are_those_of_the_full_run(pr, references):
    kinds = [facts["kind"] for facts in quant_case(pr, references).settings["tensors"].values()]
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
        distinct = [len(np.unique(scheme.make(w, (scheme.sigmas or 1.0) * step, None)[0])) for step in (1.0, 1.5, 3.0)]
        assert distinct[0] > distinct[1] > distinct[2], name


def test_the_unreachable_code_of_int5(references):
    found = quant_case("pr372", references).under("codes/")
    codes = np.concatenate([x.ravel() for name, x in found.items() if ".mlp." in name])
    ours, _ = SCHEMES["int5_row"].make(np.random.default_rng(0).standard_normal((64, 1536)).astype(np.float32), 1.0, None)
    assert codes.min() == ours.min() == -15


def test_errors_name_the_tensor_and_the_fix():
    w = np.ones((4, 4), np.float32)

    def only(scheme):
        return QuantConfig(rules=(QuantRule("", scheme),), gptq_batches=int(scheme.startswith("gptq")))

    cases = [
        ({"a": np.full((4, 4), np.nan, np.float32)}, only("int6_row"), "a: holds NaN"),
        ({"a": w.astype(np.float64)}, only("int6_row"), "a: dtype float64"),
        ({"a": w}, only("int9"), "unknown scheme 'int9'"),
        ({"a": w[0]}, only("int6_row"), "needs a matrix, but a has shape"),
        ({"a": w}, only("gptq_int6"), "a: scheme gptq_int6 needs its Hessian"),
        ({"a": w * 1e6}, only("float16"), "a: a value exceeds float16"),
        ({"a": w * 1e8}, only("int6_row"), "a: a row scale exceeds float16"),
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


def test_pr2005_without_hessians_has_its_scales_and_pass_through(references):
    """Byte estimates while training: plain rounding at the scales that GPTQ will use, codes about the same size."""
    case = quant_case("pr2005", references)
    found, want = quantize(case.tensors, without_hessians(rules(case))), stored(case)
    for name, q in found.items():
        assert q.kind == want[name].kind
        if q.codes is None:
            assert_equal(q, want[name], name)
        else:
            np.testing.assert_array_equal(q.scale, want[name].scale)
            assert abs(q.codes.astype(int) - want[name].codes).mean() < 2


def test_step_one_is_the_pr(references):
    config = rules(quant_case("pr638", references))
    w = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    same = replace(config, rules=tuple(replace(r, step=1.0) for r in config.rules))
    a, b = (quantize({"blocks.0.mlp.fc.weight": w}, c)["blocks.0.mlp.fc.weight"] for c in (config, same))
    np.testing.assert_array_equal(a.codes, b.codes)

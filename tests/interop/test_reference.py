"""What a comparison measures, and which facts a set may ask for."""

import json
import os
import re

import numpy as np
import pytest

from golf_jax.config import GolfError
from golf_jax.interop.checks import run
from golf_jax.interop.checks.schedule import padded_starts
from golf_jax.interop.comparison import CheckResult, bars_of
from golf_jax.interop.reference import Set, _fact, matches

ODD = [{"value": None}, {"value": "1"}, {"value": True}, {"measure": ["abs"]}, {"measure": "much"}, {"until": "2"}, {"names": 3}]


@pytest.mark.parametrize(("measure", "error"), [("abs", 1.0), ("of max", 0.1), ("rel L2", 0.1), ("change", 0.5), ("equal", 0.5)])
def test_each_measure_is_relative_to_its_own_thing(measure, error):
    """Ours [10, 1] for [10, 0], which began at [8, 0]: the start matters to the measure of the change alone."""
    for bar, ok in ((error * 1.001, True), (error * 0.999, False)):
        row = CheckResult("x", bar, measure)
        row.add("w", np.array([10.0, 1.0]), np.array([10.0, 0.0]), start=np.array([8.0, 0.0]))
        assert row.ok is ok


def test_an_item_has_a_tolerance_for_all_of_its_entries_or_is_refused():
    early, late, named = {"until": 2}, {}, {"names": "wq|wk"}
    early, late, named = ({"measure": "abs", "value": 1.0, **bar} for bar in (early, late, named))
    assert bars_of([early, late], "loss", "loss", (3,)) == [(early, slice(0, 2)), (late, slice(2, None))]
    assert bars_of([named, late], "after/wv", "wv", (3,)) == bars_of(late, "x", "x", ()) == [(late, ())]
    for given, part in (([early], " from its entry 2 on"), ([named], ""), ([], "")):
        with pytest.raises(GolfError, match=f"^no tolerance for loss{part}$"):
            bars_of(given, "loss", "loss", (3,))


@pytest.mark.parametrize("given", [None, "x", [None], {}, *({"measure": "abs", "value": 1, **odd} for odd in ODD)])
def test_a_tolerance_that_is_none_is_refused(given):
    with pytest.raises(GolfError, match="tolerance of loss: measure is one of abs, .*, value a number, .*; found "):
        bars_of(given, "loss", "loss", (3,))


def test_a_norm_of_several_tensors():
    ours = {"norm/blocks.0.attn.c_q.weight": 3.0, "norm/blocks.1.attn.c_q.weight": 4.0, "norm/tok_emb.weight": 9.0, "kind/a": "int6"}
    assert _fact(ours, "norm/blocks.*.attn.c_q.weight") == pytest.approx(5)
    assert _fact(ours, "norm/tok_emb.weight|blocks.0.*") == pytest.approx(np.hypot(9, 3))
    assert _fact(ours, "norm/nothing.*") is None and _fact(ours, "kind/*") is None
    assert matches("blocks.10.mlp.fc.weight", "blocks.*.mlp.fc.weight|x") and not matches("x.y", "x")


def portable(path, sections, **arrays):
    """A set of these sections on PR 2005's recipe."""
    about = {"format": 1, "made": "", "recipe": "pr2005", "hyperparameters": {}, "config": {}, "sections": sections}
    np.savez_compressed(path, reference=np.array(json.dumps(about)), **{name.replace("__", "/"): x for name, x in arrays.items()})
    return Set(path)


def test_a_set_that_claims_more_than_a_file_of_its_size_is_not_read(tmp_path):
    """Zeros of a few kB, which would be four times as many bytes in float32."""
    with pytest.raises(GolfError, match=r"its entries claim 100,\d+,\d+ bytes; of a file of this size at most"):
        portable(tmp_path / "a.npz", {"params": {"cases": {"main": {}}}}, params__main__w=np.zeros(100_000_000, np.int8))


@pytest.mark.parametrize(
    ("case", "lengths", "message"),
    [
        ({"config": {"data.rows_per_rank": 10**6}}, [90, 80], r"drawn holds \[2, 3, 2\] a step, its configuration draws \[2, 1000000, 2\]"),
        ({"config": {"data.rows_per_rank": 3}}, [90, 10**12], "shards of 1,000,000,000,090 tokens; at most 16,777,216 are made"),
    ],
)
def test_a_loader_of_any_size_is_refused_before_it_is_made(tmp_path, case, lengths, message):
    case["config"] |= {"data.ranks": 2, "data.seq_len": 64}
    arrays = {"loader__main__drawn": np.zeros((4, 2, 3, 2), np.int64), "loader__main__shard_lengths": np.array(lengths)}
    refs = portable(tmp_path / "a.npz", {"loader": {"cases": {"main": case}, "tolerances": {}}}, **arrays)
    try:
        list(run(refs, "loader"))
        told = refs.not_checked["loader/main"]
    except GolfError as error:
        told = str(error)
    assert re.search(message, told)


def test_no_bucket_of_cu_seqlens_divides_by_zero():
    assert padded_starts([[[0, 3]]], 8, 4).tolist() == [[[0, 3, 8, 8]]]
    for bucket in (0, -1, 10**9):
        with pytest.raises(GolfError, match=f"cu_bucket {bucket} is no multiple"):
            padded_starts([[[0, 3]]], 8, bucket)


def test_a_pipe_among_the_arrays_of_a_set_is_told(tmp_path):
    """It would block for ever."""
    os.mkfifo(tmp_path / "params.npz")
    (tmp_path / "reference.json").write_text(json.dumps({"format": 1, "recipe": "pr372", "sections": {}}))
    with pytest.raises(GolfError, match=r"params.npz: cannot be read"):
        Set(tmp_path)

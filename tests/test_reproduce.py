"""`python -m golf_jax.reproduce`: the PRs' reference tensors are met; a wrong number is a miss; bad input is one line."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from golf_jax import reproduce
from golf_jax.config import GolfError
from golf_jax.interop.checks import CHECKS, Context, applicable, detect
from golf_jax.interop.hparams import RECIPES

# What the small files cost most is compiling; evaluation and test-time training are checked in tests/evaluation.
PORTABLE = "model,grads,steps,quant"
CHEAP = "units,schedule,data"


def missed(path, only, devices=1):
    _, results, _ = reproduce.reproduce(path, only, devices)
    assert results
    return [f"{r.name}: {r.worst} (max abs {r.max_abs:.2e}, max rel {r.max_rel:.2e})" for r in results if not r.ok]


@pytest.mark.parametrize("recipe", RECIPES)
def test_portable_references_are_met(golden, recipe):
    assert missed(golden / f"{recipe}.npz", PORTABLE) == []


def test_eight_ranks_on_eight_devices(golden):
    """PR 1182: each rank clips its own gradient; the never-cleared trigram gradients stay with their rank."""
    assert missed(golden / "pr1182.npz", "steps", devices=8) == []


@pytest.mark.parametrize("recipe", ["pr372", "pr638", "pr1182", "pr2005"])
def test_units_schedules_and_data_order_of_the_directories(shared, recipe):
    assert missed(shared / "golden" / recipe, CHEAP) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_directories_are_met(shared, recipe):
    assert missed(shared / "golden" / recipe, "") == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_portable_files_are_met(golden, recipe):
    assert missed(golden / f"{recipe}.npz", "") == []


def rewritten(golden, tmp_path, recipe, **changes):
    arrays = dict(np.load(golden / f"{recipe}.npz"))
    arrays |= {key: change(arrays[key]) for key, change in changes.items()}
    path = tmp_path / f"{recipe}.npz"
    np.savez(path, **arrays)
    return path


def test_a_wrong_number_is_a_miss_and_named(golden, tmp_path, capsys):
    key = "codes/blocks.1.attn.c_q.weight"
    path, report = rewritten(golden, tmp_path, "pr638", **{key: lambda codes: codes + 1}), tmp_path / "report.json"
    assert reproduce.main([str(path), "--only", "quant", "--json", str(report)]) == 1
    printed = capsys.readouterr().out
    assert "MISS <- blocks.1.attn.c_q.weight" in printed
    document = json.loads(report.read_text())
    assert document["recipe"] == "pr638"
    rows = {row["name"]: row for row in document["checks"]}
    assert {"name", "compared", "max_abs", "max_rel", "tolerance", "ok"} <= set(rows["quant: codes"])
    assert not rows["quant: codes"]["ok"] and rows["quant: scales"]["ok"]


def test_within_tolerance_is_status_zero(golden):
    assert reproduce.main([str(golden / "pr638.npz"), "--only", "quant"]) == 0


def test_what_needs_torch_is_left_out_by_name_where_torch_is_not(golden, tmp_path, monkeypatch):
    report, find_spec = tmp_path / "report.json", importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    assert reproduce.main([str(golden / "pr638.npz"), "--only", "quant", "--json", str(report)]) == 0
    document = json.loads(report.read_text())
    assert "pip install" in document["not_checked"]["quant: packed file read"]
    assert {row["name"] for row in document["checks"]} == {"quant: codes", "quant: scales", "quant: kinds", "quant: dequantized"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reference_that_is_not_finite_is_a_miss(golden, tmp_path, value):
    def spoil(deq):
        deq[0, 0] = value
        return deq

    key = next(k for k in np.load(golden / "pr638.npz").files if k.startswith("dequant/blocks"))
    path = rewritten(golden, tmp_path, "pr638", **{key: spoil})
    assert any("not finite" in line for line in missed(path, "quant"))


def test_bad_input_is_one_line_and_status_two(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "golf_jax.reproduce", str(tmp_path / "nowhere")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "nowhere: no such file or directory" in run.stderr and len(run.stderr.splitlines()) == 1


def test_what_is_wrong_with_the_input_is_said(golden, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(GolfError, match="holds no npz file"):
        reproduce.reproduce(tmp_path / "empty")
    (tmp_path / "pr638.npz").write_bytes((golden / "pr638.npz").read_bytes()[:5000])
    with pytest.raises(GolfError, match="pr638.npz: not a readable npz file"):
        reproduce.reproduce(tmp_path / "pr638.npz")
    with pytest.raises(GolfError, match="no such check"):
        reproduce.reproduce(golden / "pr638.npz", "nonsense")
    (tmp_path / "pr562").mkdir()
    np.savez(tmp_path / "pr562" / "unrelated.npz", x=1)
    with pytest.raises(GolfError, match="no reference file of the golden layout"):
        reproduce.reproduce(tmp_path / "pr562")
    arrays = {k: v for k, v in np.load(golden / "pr638.npz").items() if k != "param/smear.gate"}
    np.savez(tmp_path / "pr638.npz", **arrays)
    with pytest.raises(GolfError, match="missing smear.gate"):
        reproduce.reproduce(tmp_path / "pr638.npz", "quant")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_is_told_by_the_name_or_by_the_settings(golden, tmp_path, recipe):
    anonymous = tmp_path / "references.npz"
    anonymous.write_bytes((golden / f"{recipe}.npz").read_bytes())
    assert detect(anonymous) == detect(golden / f"{recipe}.npz") == recipe


def test_every_check_names_the_files_it_needs(golden):
    ctx = Context("pr638", golden / "pr638.npz")
    assert set(applicable(ctx)) == {name for name, check in CHECKS.items() if check.portable}
    assert all(check.files or check.portable for check in CHECKS.values())

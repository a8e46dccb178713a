"""What may be changed when a run goes on."""

import bz2
import contextlib
import glob
import io
import json
import zipfile
from dataclasses import replace

import pytest
from tiny_recipes import tiny

from golf_jax.artifact.code import bundle, unbundle
from golf_jax.config import GolfError, load_recipe, to_dict
from golf_jax.files import sealed
from golf_jax.training import resume
from golf_jax.training.resume import changed, located, stages_to_repeat, stored_recipe

RECIPE = tiny("baseline")


def with_lr(lr: float):
    groups = (replace(RECIPE.optim.groups[0], lr=lr), *RECIPE.optim.groups[1:])
    return replace(RECIPE, optim=replace(RECIPE.optim, groups=groups))


def test_what_cannot_change_what_was_trained_is_taken():
    other = replace(RECIPE, log_every=1, checkpoint_every=9, micro_rows=1, eval=replace(RECIPE.eval, batch_rows=1))
    fields = {c["field"] for c in changed(RECIPE, other, (), "run")}
    assert fields == {"log_every", "checkpoint_every", "micro_rows", "eval.batch_rows"}
    assert changed(RECIPE, RECIPE, (), "run") == []
    moved = replace(RECIPE, data=replace(RECIPE.data, train="elsewhere/*.bin"))  # the text itself is compared by content
    assert [c["field"] for c in changed(RECIPE, moved, (), "run")] == ["data.train"]


def test_anything_else_is_refused_with_field_and_both_values():
    with pytest.raises(GolfError, match=r"^--resume run: seed is 1337 there and 7 here; .* or go on all the same with --accept seed$"):
        changed(RECIPE, replace(RECIPE, seed=7), (), "run")
    before = RECIPE.optim.groups[0].lr
    with pytest.raises(GolfError, match=rf"optim.groups.0.lr is {before} there and 0.5 here"):
        changed(RECIPE, with_lr(0.5), (), "run")


def test_a_named_field_is_accepted_and_recorded():
    found = changed(RECIPE, with_lr(0.5), ("optim.groups.0.lr",), "run")
    assert found == [{"field": "optim.groups.0.lr", "before": RECIPE.optim.groups[0].lr, "after": 0.5}]
    with pytest.raises(GolfError, match="--accept optim.groups.1.lr: nothing of that name differs"):
        changed(RECIPE, with_lr(0.5), ("optim.groups.0.lr", "optim.groups.1.lr"), "run")


def test_changes_repeat_the_stages_they_touch():
    assert stages_to_repeat([]) == stages_to_repeat([{"field": "log_every"}]) == ()
    assert stages_to_repeat([{"field": "quant.level"}]) == stages_to_repeat([{"field": "eval.stride"}]) == ("pack", "evaluations")
    assert stages_to_repeat([{"field": "optim.clip_norm"}]) == ("train", "pack", "evaluations")


def test_places_are_kept_as_absolute_ones(tmp_path, monkeypatch):
    """Also below a folder whose name is no glob; a link is not resolved, and `embedded` is no place."""
    folder = tmp_path / "a[1]"
    folder.mkdir()
    (folder / "train_0.bin").touch()
    monkeypatch.chdir(folder)
    given = replace(RECIPE, data=replace(RECIPE.data, train="train_*.bin", val="../link/val_*.bin", tokenizer="t.model"))
    kept = located(given)
    assert glob.glob(kept.data.train) == [str(folder / "train_0.bin")] and kept.data.tokenizer == str(folder / "t.model")
    assert kept.data.val.endswith("/a[[]1]/../link/val_*.bin") and located(kept) == kept
    assert located(load_recipe("quickstart")) == load_recipe("quickstart")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(given)))
    (tmp_path / "stages.json").write_text(json.dumps(sealed({"recipe": to_dict(kept)})))  # killed before config.json was written, too
    assert stored_recipe(tmp_path) == given


@pytest.mark.parametrize("damage", ["[]", "3", "null", '"x"', "{", "NaN", "[" * 100_000, '{"name": NaN}'])
def test_a_damaged_config_is_one_line(tmp_path, damage):
    (tmp_path / "config.json").write_text(damage)
    with pytest.raises(GolfError, match="config.json") as caught:
        stored_recipe(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_recipe_of_a_run_comes_back(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(RECIPE)))
    assert stored_recipe(tmp_path) == RECIPE
    (tmp_path / "stages.json").write_text(json.dumps(sealed({"recipe": to_dict(RECIPE)})))
    assert stored_recipe(tmp_path) == RECIPE
    (tmp_path / "config.json").write_text(json.dumps(to_dict(replace(RECIPE, seed=7))))
    with pytest.raises(GolfError, match=r"config.json: seed is 7 and was 1337 when the run wrote it; put that back"):
        stored_recipe(tmp_path)
    with pytest.raises(GolfError, match="nowhere: no run is there"):
        stored_recipe(tmp_path / "nowhere")


@pytest.mark.parametrize("other", [False, True])
def test_a_run_of_another_version_is_read_or_told_as_such(tmp_path, other):
    """Fields that are new since hold their defaults; what cannot be read is not laid at the user's door."""
    before = to_dict(RECIPE)
    del before["model"]["mlp"]
    code = bundle("golf_jax.files")
    (tmp_path / "code.pyz").write_bytes(_with_another_source(code) if other else code)
    for name, facts in (("config.json", before), ("stages.json", sealed({"recipe": before}))):
        (tmp_path / name).write_text(json.dumps(facts))
    assert stored_recipe(tmp_path) == RECIPE
    for name in ("stages.json", "config.json"):  # stages.json is read last
        (tmp_path / name).write_text(json.dumps(before | {"was": 1}))
        with pytest.raises(GolfError, match=f"{name}: ") as caught:
            stored_recipe(tmp_path)
        told = f"another version of golf_jax wrote this run; its own code goes on with it: python {tmp_path}/code.pyz --resume {tmp_path}"
        assert (told in str(caught.value)) == other


def _with_another_source(code: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("source.bz2", bz2.compress(json.dumps(unbundle(code) | {"golf_jax/files.py": "older = 1"}).encode()))
    return out.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"seed": 7}}, "seed is 1337 in process 0 and 7 in process 1; start all processes with the same command"),
        ({"text": {"tokenizer": "b"}}, "the text of process 1 is not that of process 0: "),
        ({"resume": True}, "--resume is False in process 0 and True in process 1"),
        ({"recipe": {"model": {"attention": "native"}}}, "'auto' in process 0 and 'native' in process 1; .*or with --model.attention xla"),
        ({"recipe": {"data": {"train": "elsewhere/train_*.bin"}}}, ""),
    ],
)
def test_processes_that_were_started_otherwise_are_refused(monkeypatch, change, message):
    """Else they wait for each other for ever, or train on what nobody meant."""

    def merged(here, over):
        return here | {name: merged(here[name], value) if isinstance(value, dict) else value for name, value in over.items()}

    monkeypatch.setattr(resume, "from_all", lambda mine: [mine, json.dumps(merged(json.loads(mine), change))])
    identity = {"tokenizer": "a", "train": [], "val": [], "digest": "c"}
    with pytest.raises(GolfError, match=message) if message else contextlib.nullcontext():
        resume.check_alike(replace(tiny("baseline"), seed=1337), identity, False)

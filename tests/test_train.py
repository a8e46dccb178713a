"""The main job: from text to a scored artifact and a run directory that tells all of it."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from tiny_recipes import SHIPPED, build_text, command, environment, on_text, recipe_file, tiny

from golf_jax import train
from golf_jax.config import GolfError, QuantRule, Recipe, from_dict, load_recipe
from golf_jax.model import resolve
from golf_jax.training import loop
from golf_jax.training.clock import TrainingClock

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return build_text(tmp_path_factory.mktemp("text") / "data")


def run(recipe: Recipe, path: Path, **options) -> dict:
    return train.run_recipe(recipe, train.Options(run_dir=str(path), **options))


def check_run(path: Path, result: dict) -> None:
    """What every run directory promises."""
    assert (path / "artifact.golf").stat().st_size == result["artifact_bytes"] == result["total_bytes"] - result["code_bytes"]
    assert json.loads((path / "result.json").read_text()) == result
    assert all(0.5 < e["val_bpb"] < 8 for e in result["evaluations"].values())
    steps = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(result["steps"]))
    facts = json.loads((path / "environment.json").read_text())
    assert facts["packages"]["jax"] == jax.__version__ and len(facts["tokenizer_sha256"]) == 64
    log = (path / "log.txt").read_text()
    number = r"[\d.]+"
    assert len(re.findall(rf"^step:\d+/{result['steps']} train_loss:{number} train_time:\d+ms step_avg:{number}ms", log, re.M)) >= 3
    for mode, scored in result["evaluations"].items():
        found = re.search(rf"^final_\w*_{mode}_exact val_loss:({number}) val_bpb:({number}) ", log, re.M)
        assert found and float(found[2]) == pytest.approx(scored["val_bpb"], abs=1e-8)


def test_quickstart_in_miniature(tmp_path, tmp_path_factory, monkeypatch, programs):
    """The embedded corpus: run directory, and the same score from the artifact alone in a second process."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GOLF_JAX_CACHE", str(cache))
    recipe = load_recipe("quickstart")
    shape = dict(vocab_size=512, num_layers=2, width=32, num_heads=4, num_kv_heads=2, rope_dims=4, bigram_buckets=64, bigram_dim=8)
    model = replace(recipe.model, **shape)
    data, budget = replace(recipe.data, seq_len=64, rows_per_rank=1), replace(recipe.budget, steps=4)
    recipe = replace(recipe, model=model, data=data, budget=budget, micro_rows=0, eval=replace(recipe.eval, stride=32))
    result = run(recipe, tmp_path / "run")
    check_run(tmp_path / "run", result)
    stored = from_dict(Recipe, json.loads((tmp_path / "run/config.json").read_text()))
    assert stored == replace(recipe, model=resolve(recipe.model, "cpu"))
    home = environment(programs, GOLF_JAX_CACHE=str(cache))
    again = command("golf_jax.evaluate", tmp_path / "run/artifact.golf", "--json", tmp_path / "again.json")
    done = subprocess.run(again, env=home, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    second, first = json.loads((tmp_path / "again.json").read_text()), result["evaluations"]["sliding"]
    assert second["val_bpb"] == pytest.approx(first["val_bpb"], abs=1e-6) and second["bytes"] == first["bytes"]
    with pytest.raises(GolfError, match="holds a run already"):
        run(recipe, tmp_path / "run")


def test_nothing_compiles_inside_the_clock(tmp_path, text, monkeypatch):
    """PR 2005 with its switch to depth recurrence, validation, GPTQ and test-time training.

    From the first start of the clock to its last stop no program is built, and all of them are named with their times before it.
    """
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))

    class Recorded(TrainingClock):
        def start(self):
            events.append("start")
            super().start()

        def stop(self):
            events.append("stop")
            super().stop()

    monkeypatch.setattr(loop, "TrainingClock", Recorded)
    recipe = on_text(tiny("pr2005", steps=8, vocab_size=300, seq_len=32), text)
    rules = (QuantRule("", "float16", max_numel=1024), *recipe.quant.rules[1:])  # so that the tiny matrices meet GPTQ
    recipe = replace(recipe, eval=replace(recipe.eval, every=3), quant=replace(recipe.quant, rules=rules))
    result = run(recipe, tmp_path / "run")
    check_run(tmp_path / "run", result)
    assert set(result["evaluations"]) == {"standard", "sliding", "ttt"} and result["evaluations"]["ttt"]["legal"]
    last = len(events) - events[::-1].index("stop")
    assert any("backend_compile" in e for e in events[: events.index("start")])
    assert not [e for e in events[events.index("start") : last] if "compile" in e]
    log = (tmp_path / "run/log.txt").read_text()
    named = ("train", "train_looping", "validation", "validation_looping")
    assert set(result["compile_seconds"]) == set(named)
    assert all(0 <= log.index(f"compiled {name} in ") < log.index("step:0/8 val_loss") for name in named)
    assert len(re.findall(r"^step:[036]/8 val_loss:", log, re.M)) == 3
    assert "Hessians" in log
    assert re.search(r"^int7 tok_emb ", log, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_runs_to_a_scored_artifact(name, tmp_path, text):
    recipe = on_text(tiny(name, vocab_size=300, seq_len=32, numerics="as_run"), text)
    result = run(recipe, tmp_path / "run")
    check_run(tmp_path / "run", result)
    modes = {"standard"}
    modes |= {"sliding"} if recipe.eval.stride else set()
    modes |= {"ttt"} if recipe.eval.ttt.kind != "off" else set()
    assert set(result["evaluations"]) == modes
    legal = {mode: e["legal"] for mode, e in result["evaluations"].items()}
    assert legal == {mode: not (name == "pr562" and mode == "ttt") for mode in modes}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"model": {"vocab_size": 512}}, {}, "model.vocab_size 512 differs from the 300 pieces of .*: set --model.vocab-size"),
        ({"data": {"ranks": 3}}, {}, "a batch of 3 sequences .* does not divide over 8 devices"),
        ({}, {"devices": 9}, "--devices 9: only 8 cpu"),
        ({}, {"emulate_devices": 3}, "--emulate-devices 3 does not divide the 8 sequences"),
        ({"data": {"train": "nowhere/*.bin"}}, {}, "nowhere"),
        ({"data": {"tokenizer": "no.model"}}, {}, "no.model: no such tokenizer; give --data.tokenizer, or fetch"),
        ({"data": {"seq_len": 4096}}, {}, "validation tokens are fewer than one window of data.seq_len 4096"),
        ({"model": {"attention": "cudnn"}}, {}, "model.attention 'cudnn' does not run on cpu .*: choose auto or xla"),
    ],
)
def test_impossible_combinations_are_refused_before_compilation(change, options, message, tmp_path, text, monkeypatch):
    monkeypatch.setattr(train, "train_and_score", None)  # not reached
    recipe = on_text(tiny("baseline", vocab_size=300), text)
    for section, values in change.items():
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **values)})
    with pytest.raises(GolfError, match=message) as caught:
        run(recipe, tmp_path / "run", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_resume_refuses_another_recipe_before_compilation(tmp_path, text, monkeypatch):
    recipe = on_text(tiny("baseline", vocab_size=300), text)
    (tmp_path / "run").mkdir()
    stored = tmp_path / "run/config.json"
    monkeypatch.setattr(train, "train_and_score", lambda *_: {"reached": True})
    stored.write_text(json.dumps(train.to_dict(replace(recipe, model=resolve(recipe.model, "cpu")))))
    resume = train.Options(resume=str(tmp_path / "run"))
    assert train.run_recipe(replace(recipe, log_every=3), resume) == {"reached": True}
    with pytest.raises(GolfError, match="run: was made by a recipe that differs in seed"):
        train.run_recipe(replace(recipe, seed=7), resume)
    stored.write_text("{")
    with pytest.raises(GolfError, match=r"config.json: cannot be read"):
        train.run_recipe(recipe, resume)
    with pytest.raises(GolfError, match="--resume .*nowhere: no run is there"):
        train.run_recipe(recipe, train.Options(resume=str(tmp_path / "nowhere")))


def test_errors_of_the_command_are_one_line_and_status_2(tmp_path, text, programs):
    file = recipe_file(on_text(tiny("baseline", vocab_size=300), text), tmp_path / "mine.py")
    wrong = command("golf_jax.train", file, "--data.ranks", "3", "--run-dir", tmp_path / "run")
    done = subprocess.run(wrong, env=environment(programs), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"error: a batch of 3 sequences [^\n]*\n", done.stderr) and "Traceback" not in done.stdout

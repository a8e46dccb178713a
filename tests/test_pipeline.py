"""The main job: from text to a scored artifact and a run directory that tells all of it."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_recipes import SHIPPED, build_text, command, environment, on_text, recipe_file, tiny

from golf_jax import files, pipeline, plan
from golf_jax.config import EvalConfig, GolfError, QuantRule, Recipe, SlidingConfig, from_dict, load_recipe, to_dict
from golf_jax.data.shards import write_shard
from golf_jax.data.tokenizer import Tokenizer
from golf_jax.interrupt import Interrupted
from golf_jax.opening import load, text_for
from golf_jax.pipeline import Options
from golf_jax.proof.own import check_own
from golf_jax.training import loop
from golf_jax.training.clock import TrainingClock
from golf_jax.training.keep import Keeper
from golf_jax.training.resume import stored_recipe
from golf_jax.training.rundir import RunDir

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return build_text(tmp_path_factory.mktemp("text") / "data")


def run(recipe: Recipe, path: Path, **options) -> dict:
    return pipeline.run(recipe, Options(run_dir=str(path), **options))


def check_run(path: Path, result: dict) -> None:
    """What every run directory promises."""
    assert (path / "artifact.golf").stat().st_size == result["artifact_bytes"] == result["total_bytes"] - result["code_bytes"]
    assert json.loads((path / "result.json").read_text()) == result
    assert all(0.5 < e["val_bpb"] < 8 for e in result["evaluations"].values())
    assert result["overlap"]["leaked"] == 0 < result["overlap"]["read"] and any("encode(decode" in fact for fact in result["text_facts"])
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == list(range(result["steps"]))
    scores = {row["mode"]: row["val_bpb"] for row in rows if row["event"] == "score" and row["stage"] == "packed"}
    assert scores == {mode: e["val_bpb"] for mode, e in result["evaluations"].items()}
    facts = json.loads((path / "environment.json").read_text())
    assert facts["packages"]["jax"] == jax.__version__ and len(facts["text"]["tokenizer"]) == 64
    assert (path / "code.pyz").stat().st_size == result["code_bytes"]
    assert Tokenizer(path / "tokenizer.model").sha256 == result["tokenizer_sha256"]
    log = (path / "log.txt").read_text()
    number = r"[\d.]+"
    assert len(re.findall(rf"^step:\d+/{result['steps']} train_loss:{number} train_time:\d+ms step_avg:{number}ms", log, re.M)) >= 3
    for mode, scored in result["evaluations"].items():
        found = re.search(rf"^final_\w*_{mode}_exact val_loss:({number}) val_bpb:({number}) ", log, re.M)
        assert found and float(found[2]) == pytest.approx(scored["val_bpb"], abs=1e-8)


def test_quickstart_in_miniature(tmp_path, tmp_path_factory, monkeypatch, programs):
    """The embedded corpus: run directory, and the same score from the artifact alone in a second process. Compiles meanwhile."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GOLF_JAX_CACHE", str(cache))
    recipe = load_recipe("quickstart")
    shape = dict(vocab_size=512, num_layers=2, width=32, num_heads=4, num_kv_heads=2, rope_dims=4, bigram_buckets=64, bigram_dim=8)
    model = replace(recipe.model, **shape)
    data, budget = replace(recipe.data, seq_len=64, rows_per_rank=1), replace(recipe.budget, steps=4)
    recipe = replace(
        recipe, model=model, data=data, budget=budget, micro_rows=0, eval=replace(recipe.eval, sliding=SlidingConfig(stride=32))
    )
    compile_step, compiled_in = plan.compile_step, []
    monkeypatch.setattr(plan, "compile_step", lambda *a: compiled_in.append(threading.current_thread().name) or compile_step(*a))
    result = run(recipe, tmp_path / "run")
    check_run(tmp_path / "run", result)
    assert compiled_in == ["beside"]
    stored = from_dict(Recipe, json.loads((tmp_path / "run/config.json").read_text()))
    assert stored == recipe
    home = environment(programs, GOLF_JAX_CACHE=str(cache))
    again = command("golf_jax.evaluate", tmp_path / "run", "--json", tmp_path / "again.json")
    done = subprocess.run(again, env=home, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    second, first = json.loads((tmp_path / "again.json").read_text()), result["evaluations"]["sliding"]
    assert second["val_bpb"] == pytest.approx(first["val_bpb"], abs=1e-6) and second["bytes"] == first["bytes"]
    with pytest.raises(GolfError, match="holds a run already"):
        run(recipe, tmp_path / "run")


def test_nothing_compiles_inside_the_clock(tmp_path, text, monkeypatch):
    """PR 2005 with its switch to depth recurrence, validation and GPTQ.

    From the first start of the clock to its last stop training waits for no program: all of its own are named with their times before it.
    What scoring needs may be compiled beside it, in other threads.
    """
    events: list[str] = []

    def heard(name, *_, **__):
        if threading.current_thread() is threading.main_thread():
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(heard)

    class Recorded(TrainingClock):
        def start(self):
            events.append("start")
            super().start()

        def stop(self):
            events.append("stop")
            super().stop()

    monkeypatch.setattr(loop, "TrainingClock", Recorded)
    monkeypatch.setattr(pipeline, "cores", lambda: 4)  # so that there are such threads
    recipe = on_text(tiny("pr2005", steps=8, vocab_size=300, seq_len=32), text)
    rules = (QuantRule("", "float16", max_numel=1024), *recipe.quant.rules[1:])  # so that the tiny matrices meet GPTQ
    recipe = replace(
        recipe, eval=EvalConfig(batch_rows=8, every=3, sliding=SlidingConfig(stride=0)), quant=replace(recipe.quant, rules=rules)
    )
    result = run(recipe, tmp_path / "run")
    check_run(tmp_path / "run", result)
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
    modes |= {name for name in ("sliding", "score_first", "adapt_first") if getattr(recipe.eval, name).on}
    assert set(result["evaluations"]) == modes
    legal = {mode: e["legal"] for mode, e in result["evaluations"].items()}
    assert legal == {mode: mode != "adapt_first" for mode in modes}


def test_a_run_goes_on_at_the_first_stage_that_is_not_done(tmp_path, text, monkeypatch):
    """Ended after training, after packing, between two scores, after the last: nothing is done twice, and the result is the same."""
    recipe = on_text(tiny("baseline", vocab_size=300, seq_len=32), text)
    recipe = replace(recipe, eval=replace(recipe.eval, sliding=SlidingConfig(stride=16)))
    whole = run(recipe, tmp_path / "whole")

    def ends(*_, **__):
        raise Interrupted(signal.SIGTERM)

    def told(run, line):
        say(run, line)
        if "standard_exact" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    def noted(run, stage, facts):
        note(run, stage, facts)
        if stage == "evaluations" and "sliding" in facts:
            raise Interrupted(signal.SIGTERM)

    path, say, note = tmp_path / "run", RunDir.log, RunDir.note
    shard = text / "val_000000.bin"
    kept = shard.read_bytes()
    ends_at = ((pipeline, "pack_model", ends), (pipeline, "open_artifact", ends), (RunDir, "log", told), (RunDir, "note", noted))
    for place, stage, substitute in ends_at:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(place, stage, substitute)
            pipeline.run(recipe, Options(run_dir=str(path)) if stage == "pack_model" else Options(resume=str(path)))
        log = (path / "log.txt").read_text()
        assert log.count("step:1/") == 1 and "interrupted by SIGTERM" in log
        if stage == "open_artifact":  # training is over, and all the same: on no other data, here without their last document
            first = np.frombuffer(kept[1024:], np.uint16)
            write_shard(shard, first[: np.flatnonzero(first == 1)[-1]])
            with pytest.raises(GolfError, match="val_000000.bin: sha256 differs from the manifest's"):
                pipeline.run(recipe, Options(resume=str(path)))
            manifest = (text / "manifest.json").rename(tmp_path / "manifest.json")  # nothing but the run says what it was
            with pytest.raises(GolfError, match="the data are not those of this run: val shard val_000000.bin: another bytes, content"):
                pipeline.run(recipe, Options(resume=str(path)))
            manifest.rename(text / "manifest.json")
            shard.write_bytes(kept)
    result = pipeline.run(recipe, Options(resume=str(path)))
    log = (path / "log.txt").read_text()
    assert [log.count(line) for line in ("training complete, packing", "quantized and packed", "standard_exact", "sliding_exact")] == [
        1
    ] * 4
    check_run(path, result)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [row["mode"] for row in rows if row["event"] == "score"] == ["standard", "standard", "sliding"]  # before quantization, packed
    assert {m: e["val_bpb"] for m, e in result["evaluations"].items()} == {m: e["val_bpb"] for m, e in whole["evaluations"].items()}
    assert (path / "artifact.golf").read_bytes() == (tmp_path / "whole/artifact.golf").read_bytes()
    assert pipeline.run(recipe, Options(resume=str(path))) == result
    assert (path / "log.txt").read_text().endswith(f"finished: see {path / 'result.json'}\n")
    for damage in (json.dumps(result | {"sha256": "0"}), json.dumps(result | {"evaluations": {}}), "[]", ""):
        (path / "result.json").write_text(damage)
        assert pipeline.run(recipe, Options(resume=str(path))) == json.loads((path / "result.json").read_text()) == result


@pytest.mark.parametrize("name", ["config.json", "stages.json", "artifact.golf", "result.json"])
def test_a_full_disk_names_the_command_that_goes_on(tmp_path, text, monkeypatch, name):
    """Whatever could not be written last: the same artifact comes of the command that the last line names."""
    recipe = on_text(tiny("baseline", vocab_size=300, seq_len=32), text)
    path, write = tmp_path / "run", RunDir.write

    def full(run, file, content):
        if file == name and (name != "stages.json" or "train" in content):
            raise files.NotWritten(f"{run.path / file}: cannot be written (No space left on device)")
        return write(run, file, content)

    monkeypatch.setattr(RunDir, "write", full)
    with pytest.raises(GolfError) as stop:
        run(recipe, path)
    rest = "start again" if name == "config.json" else f"go on with: python -m golf_jax.train --resume {path}"
    assert str(stop.value) == f"{path / name}: cannot be written (No space left on device); once that is mended, {rest}"
    monkeypatch.undo()
    result = pipeline.run(recipe, Options(resume=str(path))) if name != "config.json" else run(recipe, path)
    check_run(path, result)


def test_a_full_disk_that_kept_nothing_of_a_training_names_the_command_that_starts_again(tmp_path, text, monkeypatch):
    """No checkpoint had room, and the artifact has none either: nobody is told that nothing was trained."""
    recipe, path = on_text(tiny("baseline", vocab_size=300, seq_len=32, steps=4), text), tmp_path / "run"
    write = RunDir.write

    def full(run, file, content):
        if file == "artifact.golf":
            raise files.NotWritten("full")
        return write(run, file, content)

    monkeypatch.setattr(Keeper, "save", lambda *_, **__: False)
    monkeypatch.setattr(RunDir, "write", full)
    with pytest.raises(GolfError, match=r"^full; nothing is kept yet; once that is mended, start again with: .* --devices \d+$"):
        run(recipe, path)


def test_other_code_and_another_backend_are_told_and_recorded(tmp_path, text, monkeypatch):
    """Of another version, or edited since, or on a machine without a compiler: the result must not pass for that of one program."""
    recipe, path = on_text(tiny("baseline", vocab_size=300, seq_len=32, steps=4), text), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(pipeline, "pack_model", lambda *_, **__: (_ for _ in ()).throw(Interrupted(signal.SIGTERM)))
        run(recipe, path)
    (path / "code.pyz").write_bytes(b"an earlier version")
    used = json.loads((path / "environment.json").read_text())
    (path / "environment.json").write_text(json.dumps(used | {"attention": "cudnn", "devices_used": 64, "cores_used": 512}))
    result = pipeline.run(recipe, Options(resume=str(path)))
    now = hashlib.sha256((path / "code.pyz").read_bytes()).hexdigest()[:12]
    assert result["changes"] == [
        {"field": "attention", "before": "cudnn", "after": used["attention"]},
        {"field": "devices_used", "before": 64, "after": used["devices_used"]},
        {"field": "cores_used", "before": 512, "after": used["cores_used"]},
        {"field": "code", "before": hashlib.sha256(b"an earlier version").hexdigest()[:12], "after": now},
    ]
    log = (path / "log.txt").read_text()
    assert log.count("WARNING: the code is another") == 1 and f"code: {result['changes'][-1]['before']} -> {now}" in log
    for line in (
        f"attention is {used['attention']} here and was cudnn",
        f"cores_used is {used['cores_used']} here and was 512: the same to",
    ):
        assert log.count(line) == 1


def test_another_artifact_has_no_score_of_the_one_before(tmp_path, text):
    """The artifact and the last checkpoint are lost; what is trained instead, here with another clip, is scored itself."""
    recipe, path = replace(on_text(tiny("baseline", vocab_size=300, seq_len=32, steps=4), text), checkpoint_every=2), tmp_path / "run"
    before = run(recipe, path)
    (path / "artifact.golf").unlink()
    shutil.rmtree(path / "checkpoints/4")
    other = replace(recipe, optim=replace(recipe.optim, clip_norm=0.01))
    stages = json.loads((path / "stages.json").read_text()) | {"recipe": to_dict(other)}
    (path / "config.json").write_text(json.dumps(to_dict(other)))
    (path / "stages.json").write_text(json.dumps(files.sealed(stages)))
    with pytest.raises(GolfError, match="checkpoint 2 is another run's: optim.clip_norm is .* there and 0.01 in config.json"):
        pipeline.run(other, Options(resume=str(path)))
    change = {"field": "optim.clip_norm", "before": recipe.optim.clip_norm, "after": 0.01}
    (path / "stages.json").write_text(json.dumps(files.sealed(stages | {"changes": [change]})))
    result = pipeline.run(other, Options(resume=str(path)))
    assert result["sha256"] != before["sha256"] and (path / "log.txt").read_text().count("standard_exact") == 2
    score = {name: e["val_bpb"] for name, e in result["evaluations"].items()}
    assert score.keys() == before["evaluations"].keys() and score != {name: e["val_bpb"] for name, e in before["evaluations"].items()}


def test_a_run_on_relative_places_is_the_same_run_from_every_folder(tmp_path, text, monkeypatch):
    """Finished, resumed, scored and checked elsewhere; one that an earlier version left goes on in its own folder."""
    recipe, path = on_text(tiny("baseline", vocab_size=300, seq_len=32, steps=4), Path()), tmp_path / "run"
    assert not os.path.isabs(recipe.data.train)
    monkeypatch.chdir(text)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(pipeline, "pack_model", lambda *_, **__: (_ for _ in ()).throw(Interrupted(signal.SIGTERM)))
        run(recipe, path)
    monkeypatch.chdir(tmp_path)
    result = pipeline.run(stored_recipe(path), Options(resume=str(path)))
    assert result["changes"] == [] and stored_recipe(path).data.val == str(text / "val_*.bin")
    assert text_for(load(path)).identity["val"] == result["text"]["val"]
    found = check_own(path, rerun=False)
    assert "pass" in {f.status for f in found if f.rule == "data"} and not any("cannot be read" in f.text for f in found)
    stages = json.loads((path / "stages.json").read_text()) | {"recipe": to_dict(recipe)}
    (path / "config.json").write_text(json.dumps(to_dict(recipe)))
    (path / "stages.json").write_text(json.dumps(files.sealed(stages)))
    (path / "result.json").unlink()
    monkeypatch.chdir(text)
    again = pipeline.run(stored_recipe(path), Options(resume=str(path)))
    assert again["changes"] == [] and again["sha256"] == result["sha256"] and stored_recipe(path).data.val == str(text / "val_*.bin")


def test_an_altered_config_is_found_by_the_checkpoint_alone(tmp_path, text):
    """stages.json, which has the recipe too, is removed where it was damaged."""
    recipe, path = on_text(tiny("baseline", vocab_size=300, seq_len=32, steps=4), text), tmp_path / "run"
    result = run(recipe, path)
    (path / "stages.json").unlink()
    altered = replace(recipe, optim=replace(recipe.optim, clip_norm=7.0), log_every=3)
    (path / "config.json").write_text(json.dumps(to_dict(altered)))
    with pytest.raises(GolfError, match=f"optim.clip_norm is 7.0 and was {recipe.optim.clip_norm} when the run wrote it"):
        pipeline.run(altered, Options(resume=str(path)))
    (path / "config.json").write_text(json.dumps(to_dict(recipe)))
    accepted = pipeline.run(altered, Options(resume=str(path), accept=("optim.clip_norm",)))
    assert accepted["sha256"] == result["sha256"] and [c["field"] for c in accepted["changes"]] == ["optim.clip_norm", "log_every"]


def test_what_is_no_longer_there_is_said(tmp_path, text):
    recipe = on_text(tiny("baseline", vocab_size=300, seq_len=32), text)
    with pytest.raises(GolfError, match="nowhere: no run is there"):
        pipeline.run(recipe, Options(resume=str(tmp_path / "nowhere")))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json").write_text(json.dumps(to_dict(recipe)))
    with pytest.raises(GolfError, match="new: no checkpoint: nothing to go on from"):
        pipeline.run(recipe, Options(resume=str(tmp_path / "new")))
    with pytest.raises(GolfError, match="new: seed is 1337 there and 7 here"):
        pipeline.run(replace(recipe, seed=7), Options(resume=str(tmp_path / "new")))


def test_errors_of_the_command_are_one_line_and_status_2(tmp_path, text, programs):
    file = recipe_file(on_text(tiny("baseline", vocab_size=300), text), tmp_path / "mine.py")
    wrong = command("golf_jax.train", file, "--data.ranks", "3", "--run-dir", tmp_path / "run")
    done = subprocess.run(wrong, env=environment(programs), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"error: a batch of 3 sequences [^\n]*\n", done.stderr) and "Traceback" not in done.stdout

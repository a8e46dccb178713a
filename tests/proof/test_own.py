"""A run directory of this project: what its files show again, and every file that was changed after the run."""

import json
import subprocess

import numpy as np
import pytest
from made_runs import evaluation, pack_facts, result
from tiny_recipes import build_text, command, environment, on_text, recipe_file, tiny

from golf_jax.artifact import pack
from golf_jax.artifact.code import bundle, raw_code_bytes
from golf_jax.config import GolfError, to_dict
from golf_jax.data.manifest import sha256_file
from golf_jax.proof import own
from golf_jax.proof.own import check_own, check_together
from golf_jax.quant import QTensor


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return build_text(tmp_path_factory.mktemp("text") / "data")


@pytest.fixture(scope="module")
def code():
    return bundle("golf_jax.config")


def run_directory(path, text, code, seed=42, **over):
    path.mkdir()
    artifact = pack({}, {"w": QTensor("float32", "float32", values=np.ones((4, 4), np.float32))}, "zstd", 3)
    e, sizes = evaluation(), pack_facts(len(artifact), len(code), raw_code_bytes(code))
    said = result(**sizes, tokenizer_sha256=sha256_file(text / "tokenizer.model")) | over
    (path / "config.json").write_text(json.dumps(to_dict(on_text(tiny("baseline"), text)) | {"seed": seed}))
    (path / "environment.json").write_text(json.dumps({"devices": ["NVIDIA H100 80GB HBM3"] * 8, "devices_used": 8}))
    (path / "result.json").write_text(json.dumps(said))
    line = f"val_loss:{e['val_loss']:.8f} val_bpb:{e['val_bpb']:.8f} nats:3000.000000 tokens:1000 bytes:2400"
    (path / "log.txt").write_text(
        f"step:10/10 train_loss:3.1{seed} train_time:500000ms\nfinal_int6_standard_exact {line} eval_time:2000ms\n"
    )
    (path / "artifact.golf").write_bytes(artifact)
    (path / "code.pyz").write_bytes(code)
    (path / "tokenizer.model").write_bytes((text / "tokenizer.model").read_bytes())
    return path


def alarms(path, **options):
    return {(f.status, f.rule) for f in check_own(path, rerun=False, **options) if f.status in ("fail", "warning")}


def test_a_sound_run(tmp_path, text, code):
    path = run_directory(tmp_path / "run", text, code)
    assert alarms(path) == {("warning", "implied bytes"), ("warning", "data")}  # not the official text; generated, without capitals
    passed = {f.rule for f in check_own(path, rerun=False) if f.status == "pass"}
    assert passed >= {"coverage", "bytes", "code", "training clock", "Hessian clock", "data", "C1", "C2", "C3", "C4", "claims"}


@pytest.mark.parametrize(
    "over, alarm",
    [
        ({"train_seconds": 700.0}, ("fail", "training clock")),
        ({"train_and_calibration_seconds": 601.0}, ("fail", "Hessian clock")),
        ({"total_bytes": 1}, ("fail", "claims")),
        ({"tokenizer_sha256": "0" * 64}, ("fail", "data")),
        ({"code_bytes_raw": 7}, ("fail", "code")),
        ({"evaluations": {"standard": evaluation() | {"val_bpb": 1.0}}}, ("fail", "implied bytes")),
        ({"evaluations": {"standard": evaluation(nats=2_999.0)}}, ("fail", "claims")),
    ],
)
def test_what_result_json_says_is_measured(tmp_path, text, code, over, alarm):
    assert alarm in alarms(run_directory(tmp_path / "run", text, code, **over))


def test_facts_of_the_evaluation(tmp_path, text, code):
    for fact, rule in (
        ({"causal": False}, "C1"),
        ({"normalization_error": 0.1}, "C2"),
        ({"order_violations": 3}, "C3"),
        ({"covered": 9}, "coverage"),
    ):
        e = evaluation()
        path = run_directory(tmp_path / rule, text, code, evaluations={"standard": e | {"facts": e["facts"] | fact}})
        assert ("fail", rule) in alarms(path)


def test_files_changed_after_the_run(tmp_path, text, code):
    path = run_directory(tmp_path / "run", text, code)
    data = bytearray((path / "artifact.golf").read_bytes())
    data[-3] ^= 1
    (path / "artifact.golf").write_bytes(data)
    (path / "code.pyz").write_bytes(code[:-200])
    assert alarms(path) >= {("fail", "claims"), ("fail", "code")}
    (path / "artifact.golf").unlink()
    assert ("fail", "bytes") in alarms(path)


def test_validation_documents_in_training(tmp_path, text, code):
    path = run_directory(tmp_path / "run", text, code)
    config = json.loads((path / "config.json").read_text())
    config["data"]["train"] = config["data"]["val"]
    (path / "config.json").write_text(json.dumps(config))
    assert ("fail", "data") in alarms(path)


def test_damaged_and_unfinished_runs(tmp_path, text, code):
    path = run_directory(tmp_path / "run", text, code)
    for damage, word in (
        ('{"evaluations": {}}', "train_and_calibration_seconds is missing"),
        (json.dumps(result(evaluations={})), "evaluations is {}, not of length 1 to 100"),
        (json.dumps(result(evaluations={"a": evaluation() | {"bytes": "x"}})), "evaluations.a.bytes is 'x', not a whole number"),
        (json.dumps(result(evaluations={"a": evaluation() | {"val_bpb": -1}})), "evaluations.a.val_bpb is -1, not from 0 to"),
        ("{", "JSON"),
    ):
        (path / "result.json").write_text(damage)
        with pytest.raises(GolfError, match=f"result.json: .*{word}"):
            check_own(path)
    (path / "environment.json").write_text('{"devices": 8}')
    (path / "result.json").write_text(json.dumps(result()))
    with pytest.raises(GolfError, match="environment.json: devices is 8, not a list; put back what the run wrote"):
        check_own(path)
    (path / "environment.json").unlink()
    (path / "result.json").unlink()
    assert [f.status for f in check_own(path)] == ["not checkable"]


def test_the_score_of_a_fresh_process_counts(tmp_path, text, code, monkeypatch):
    path = run_directory(tmp_path / "run", text, code)

    def evaluate(nats):
        def start(arguments, **_):
            with open(arguments[arguments.index("--json") + 1], "w") as file:
                json.dump(evaluation(nats), file)
            return subprocess.CompletedProcess(arguments, 0, "", "")

        return start

    for nats, status in ((3_000.0, "pass"), (3_001.0, "fail")):
        monkeypatch.setattr(own.subprocess, "run", evaluate(nats))
        assert [f.status for f in check_own(path) if f.rule == "round trip"] == [status]


def test_runs_together(tmp_path, text, code):
    paths = [run_directory(tmp_path / f"run{seed}", text, code, seed=seed) for seed in (1, 2, 3)]
    assert [f.status for f in check_together(paths)] == ["pass", "pass"]
    assert [f.status for f in check_together([paths[0], paths[0]])][:1] == ["fail"]


@pytest.mark.slow
def test_a_real_run_passes_in_a_fresh_process(tmp_path, text, programs, monkeypatch):
    file = recipe_file(on_text(tiny("baseline", vocab_size=300), text), tmp_path / "recipe.py")
    env = environment(programs)
    done = subprocess.run(command("golf_jax.train", file, "--run-dir", tmp_path / "run"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = {f.rule: f for f in check_own(tmp_path / "run")}
    assert found["round trip"].status == "pass", found["round trip"]
    assert all(f.status != "fail" for f in found.values())

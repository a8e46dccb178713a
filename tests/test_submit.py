"""The submission folder: what is refused, what the files say, and that train_gpt.py needs nothing of this checkout."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_runs import ENVIRONMENT, evaluation, pack_facts, result
from tiny_recipes import build_text, environment, on_text, tiny

from golf_jax.artifact import pack
from golf_jax.artifact.code import bundle, raw_code_bytes, unbundle
from golf_jax.config import GolfError, load_recipe, to_dict
from golf_jax.data.manifest import sha256_file
from golf_jax.files import NotWritten, write_atomic
from golf_jax.pipeline import Options, run
from golf_jax.proof import submission
from golf_jax.proof.checking import check
from golf_jax.quant import QTensor
from golf_jax.submit import main

WHO = ("--author", "A. Name", "--github-id", "aname")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return build_text(tmp_path_factory.mktemp("text") / "data")


def finished_run(path, text, seed=42, nats=3_000.0, module="golf_jax.config", **over):
    """What a run leaves behind, made up."""
    path.mkdir()
    code, artifact = (
        bundle(module),
        pack({}, {"w": QTensor("float32", "float32", values=np.full((4, 4), seed, "f4"))}, "zstd", 3),
    )
    e = evaluation(nats)
    sizes = pack_facts(len(artifact), len(code), raw_code_bytes(code))
    said = result(**sizes, evaluations={"standard": e}, tokenizer_sha256=sha256_file(text / "tokenizer.model")) | over
    log = f"step:10/10 train_loss:3.1\nCode size (compressed): {len(code)} bytes\nTotal submission size: {said['total_bytes']} bytes\n"
    log += f"final_standard_exact val_loss:{e['val_loss']:.8f} val_bpb:{e['val_bpb']:.8f} nats:{nats} tokens:1000 bytes:2400\n"
    recipe = to_dict(on_text(tiny("baseline"), text)) | {"seed": seed}
    for name, value in (("config", recipe), ("environment", ENVIRONMENT), ("result", said)):
        (path / f"{name}.json").write_text(json.dumps(value))
    for name, data in (("log.txt", log.encode()), ("code.pyz", code), ("artifact.golf", artifact)):
        (path / name).write_bytes(data)
    (path / "tokenizer.model").write_bytes((text / "tokenizer.model").read_bytes())
    return path


def submit(*paths, out, flags=("--non-record", "--no-rerun")):
    return main([*map(str, paths), *WHO, *flags, "--out", str(out)])


def test_the_folder_says_what_the_runs_measured(tmp_path, text, capsys):
    runs = [finished_run(tmp_path / f"run{seed}", text, seed, nats) for seed, nats in ((1, 3_000.0), (2, 3_030.0), (3, 3_060.0))]
    out = tmp_path / "out"
    assert submit(*runs, out=out) == 0
    said = json.loads((out / "submission.json").read_text())
    bpb = [nats / 2_400 / math.log(2) for nats in (3_000.0, 3_030.0, 3_060.0)]
    assert said["seeds"] == [1, 2, 3] and said["track"] == "non_record_16mb" and said["hardware"] == "2 x cpu"
    assert said["val_bpb"] == pytest.approx(np.mean(bpb)) and said["val_bpb_std"] == pytest.approx(np.std(bpb, ddof=1))
    assert said["seed_results"]["2"]["val_loss"] == 3.03
    assert said["bytes_code"] == (out / "train_gpt.py").stat().st_size
    assert said["bytes_total"] == max((out / f"artifact_seed{s}.golf").stat().st_size for s in (1, 2, 3)) + said["bytes_code"]
    assert said["compliance"]["train_under_600s"] and said["compliance"]["three_seeds"]
    for path, seed in zip(runs, (1, 2, 3), strict=True):
        assert (out / f"train_seed{seed}.log").read_bytes() == (path / "log.txt").read_bytes()
    assert unbundle((out / "train_gpt.py").read_bytes()) == unbundle((runs[0] / "code.pyz").read_bytes())
    assert (out / "requirements.txt").read_text() == "jax==0.10.2\nnumpy==2.4.6\n"
    assert str(text) not in (out / "recipe.json").read_text() and load_recipe(str(out / "recipe.json")).data.tokenizer == "tokenizer.model"
    found = check([out], [])[str(out)]  # it is another text than the challenge's, and says so
    assert {f.rule for f in found if f.status in ("fail", "warning")} <= {"implied bytes", "coverage"}, found
    assert sum(f.rule == "claims" and f.status == "pass" for f in found) == 13  # 12 of submission.json, and the table of README.md
    assert str(said["seed_results"]["1"]["val_bpb"])[:9] in (out / "README.md").read_text()


def test_a_run_that_fails_is_no_record(tmp_path, text):
    bad = finished_run(tmp_path / "bad", text, tokenizer_sha256="0" * 64)
    with pytest.raises(GolfError, match="no record: .*tokenizer.model is not the one the run used.*--non-record"):
        submit(bad, out=tmp_path / "out", flags=("--no-rerun",))
    assert not (tmp_path / "out").exists()
    assert submit(bad, out=tmp_path / "out") == 0
    assert re.search(r"^ *fail +data ", (tmp_path / "out/README.md").read_text(), re.M)
    with pytest.raises(GolfError, match="is not empty"):
        submit(bad, out=tmp_path / "out")


def test_a_full_disk_leaves_no_half_submission(tmp_path, text, monkeypatch):
    run = finished_run(tmp_path / "run", text)

    def full(path, content):
        if path.name == "submission.json":
            raise NotWritten(f"{path}: cannot be written")
        return write_atomic(path, content)

    monkeypatch.setattr(submission, "write_atomic", full)
    with pytest.raises(GolfError, match="submission.json: cannot be written"):
        submit(run, out=tmp_path / "out")
    monkeypatch.undo()
    assert not list((tmp_path / "out").iterdir()) and submit(run, out=tmp_path / "out") == 0


def test_an_evaluation_counts_only_where_it_is_legal_in_every_run(tmp_path, text):
    one, other = (finished_run(tmp_path / name, text, seed) for name, seed in (("one", 1), ("other", 2)))
    said = json.loads((other / "result.json").read_text())
    said["evaluations"]["sliding"] = said["evaluations"]["standard"]
    said["evaluations"]["standard"] = said["evaluations"]["standard"] | {"legal": False}
    (other / "result.json").write_text(json.dumps(said))
    with pytest.raises(GolfError, match=f"no evaluation is legal in all of {one}, {other}"):
        submit(one, other, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({}, "devices is missing"),
        (ENVIRONMENT | {"devices": []}, r"devices is \[\], not of length 1"),
        (ENVIRONMENT | {"devices_used": True}, "devices_used is True, not a whole number"),
        (ENVIRONMENT | {"packages": {"jax": "\x1b[31m"}}, "packages.jax is .* printable"),
        (ENVIRONMENT | {"packages": {}}, "devices_used or packages.jax is missing"),
        ({"devices": ["cpu"], "packages": {"jax": "1"}}, "devices_used or packages.jax is missing"),
    ],
)
def test_an_environment_that_is_none_is_told_in_one_line(tmp_path, text, facts, word):
    run = finished_run(tmp_path / "run", text)
    (run / "environment.json").write_text(json.dumps(facts))
    with pytest.raises(GolfError, match=f"environment.json: {word}.*; put back what the run wrote"):
        submit(run, out=tmp_path / "out")
    (run / "environment.json").unlink()
    with pytest.raises(GolfError, match="environment.json: it is missing, and a submission says where it ran"):
        submit(run, out=tmp_path / "out")


def test_a_fault_of_ours_is_not_blamed_on_the_files(tmp_path, text, monkeypatch):
    monkeypatch.setattr(submission, "claims", lambda *_: {}["a fault"])
    with pytest.raises(KeyError):
        submit(finished_run(tmp_path / "run", text), out=tmp_path / "out")


def test_a_run_that_contradicts_itself_is_no_submission_at_all(tmp_path, text):
    bad = finished_run(tmp_path / "bad", text, total_bytes=1)
    with pytest.raises(GolfError, match="no submission: .*the files have "):
        submit(bad, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_text_or_machine_is_no_record(tmp_path, text):
    with pytest.raises(GolfError, match="not the official validation set.*the times are those of 4 x cpu"):
        submit(finished_run(tmp_path / "run", text), out=tmp_path / "out", flags=("--no-rerun",))


def test_runs_that_are_not_one_submission(tmp_path, text):
    one, same = (finished_run(tmp_path / name, text, 1) for name in "ab")
    other = finished_run(tmp_path / "c", text, 2, module="golf_jax.config.base")
    with pytest.raises(GolfError, match="same seed: 1, 1"):
        submit(one, same, out=tmp_path / "out")
    with pytest.raises(GolfError, match="did not run the same code"):
        submit(one, other, out=tmp_path / "out")
    (one / "result.json").unlink()
    with pytest.raises(GolfError, match="has not finished; .*--resume"):
        submit(one, out=tmp_path / "out")
    with pytest.raises(GolfError, match="nothing to submit"):
        main(list(WHO))


ALONE = """import importlib.util, os, runpy, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
sys.path = [p for p in sys.path if not os.path.isdir(os.path.join(p, "golf_jax"))]
assert importlib.util.find_spec("golf_jax") is None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["artifact.golf", "code.pyz", "log.txt", "tokenizer.model"])
def test_a_pipe_in_a_run_directory_is_told(tmp_path, text, name):
    """It would block for ever."""
    run = finished_run(tmp_path / "r", text)
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(GolfError, match=rf"{name}: cannot be read \(a pipe|{name} is missing"):
        main([str(run), "--non-record", "--no-rerun", "--out", str(tmp_path / "out"), "--author", "A", "--github-id", "a"])


@pytest.mark.slow
def test_train_gpt_runs_alone_and_scores_the_same(tmp_path, text, programs):
    """In an otherwise empty folder, in a process that cannot import golf_jax: the same bytes, the same score, and it trains."""
    recipe = on_text(tiny("baseline", vocab_size=300, seq_len=32), text)
    scored = run(recipe, Options(run_dir=str(tmp_path / "run")))
    assert submit(tmp_path / "run", out=tmp_path / "out") == 0

    def alone(*arguments: str | Path) -> str:
        data = ("--data.train", text / "train_*.bin", "--data.val", text / "val_*.bin")
        command = [sys.executable, "-I", "-c", ALONE, "train_gpt.py", "recipe.json", *map(str, (*arguments, *data))]
        done = subprocess.run(command, cwd=tmp_path / "out", env=environment(programs), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = alone("--score", f"artifact_seed{recipe.seed}.golf")
    assert f"{scored['artifact_bytes']:,} bytes, SHA-256 {scored['sha256']}" in said
    for name, e in scored["evaluations"].items():
        printed = re.search(rf"^{name} .*val_bpb:(\S+) ", said, re.M)  # compiled with other options there
        assert printed and float(printed[1]) == pytest.approx(e["val_bpb"], abs=1e-6), said
    alone("--budget.steps", "2", "--schedule.warmdown-steps", "1", "--run-dir", "again")
    assert json.loads((tmp_path / "out/again/result.json").read_text())["steps"] == 2

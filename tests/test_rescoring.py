"""`reproduce --log`: the artifact is scored as its log says, value by value; a partial run is compared with nothing."""

import json
from pathlib import Path

import pytest
from test_evaluate import folder  # noqa: F401 - a fixture

from golf_jax import evaluate, reproduce
from golf_jax.artifact.__main__ import main as artifact
from golf_jax.config import GolfError
from golf_jax.proof.logs import parse_log
from golf_jax.rescoring import read_run, ways

NAMES = {"standard": "final_int6_roundtrip", "sliding": "final_int6_sliding_window", "ttt": "legal_ttt"}


@pytest.fixture(scope="module")
def scored(folder, tmp_path_factory):  # noqa: F811
    """The artifact's folder with train.log, as a record's script would have written it."""
    lines, root = [], tmp_path_factory.mktemp("scored")
    for mode, name in NAMES.items():
        text = ["--val", str(folder / "val_*.bin"), "--tokenizer", str(folder / "tokenizer.model")]
        evaluate.main([str(folder / "artifact.golf"), *text, "--mode", mode, "--devices", "1", "--json", str(root / "score.json")])
        e = json.loads((root / "score.json").read_text())
        lines += [f"{name} val_loss:{e['val_loss']:.4f} val_bpb:{e['val_bpb']:.4f} eval_time:90ms"]
        lines += [f"{name}_exact val_loss:{e['val_loss']:.8f} val_bpb:{e['val_bpb']:.8f}"]
        if mode == "sliding":  # the records say it again under the old name
            lines += [f"final_int8_zlib_roundtrip_exact val_loss:{e['val_loss']:.8f} val_bpb:{e['val_bpb']:.8f}"]
    size = (folder / "artifact.golf").stat().st_size
    head = [*(f"step:{i}/2 train_loss:5.6 train_time:9ms" for i in (1, 2)), "DIAGNOSTIC post_ema val_loss:9.0000 val_bpb:9.0000"]
    (root / "train.log").write_text("\n".join([*head, f"Serialized model int6+zstd: {size} bytes", *lines]) + "\n")
    return root / "train.log"


def arguments(folder, log, *more):  # noqa: F811
    text = ["--val", str(folder / "val_*.bin"), "--tokenizer", str(folder / "tokenizer.model")]
    return ["--log", str(log), "--artifact", str(folder / "artifact.golf"), *text, *more]


def test_every_value_of_the_log_is_met(folder, scored, tmp_path, capsys):  # noqa: F811
    assert reproduce.main(arguments(folder, scored, "--json", str(tmp_path / "r.json"))) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["values"]) == 1 + 3 * 2 * len(NAMES) and all(row["ok"] for row in report["values"])
    assert list(report["not_checked"].values()) == ["the same figures as a line before"]
    assert "none missed" in capsys.readouterr().out


def test_a_wrong_value_is_a_miss_and_named(folder, scored, tmp_path, capsys):  # noqa: F811
    lines = scored.read_text().splitlines()
    wrong = [line.replace("val_bpb:", "val_bpb:1") if line.startswith("legal_ttt_exact") else line for line in lines]
    (tmp_path / "wrong.log").write_text("\n".join(wrong) + "\n")
    assert reproduce.main(arguments(folder, tmp_path / "wrong.log")) == 1
    missed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "  MISS  " in line]
    assert missed == ["legal_ttt_exact (score_first)"] * 2  # and the bytes that both figures imply


def test_a_partial_run_is_compared_with_nothing(folder, scored, tmp_path, capsys):  # noqa: F811
    assert reproduce.main(arguments(folder, scored, "--max-docs", "8", "--json", str(tmp_path / "r.json"))) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["values"] == [] and sum("compared with nothing" in why for why in report["not_checked"].values()) == 2 * len(NAMES)
    assert "PARTIAL" in capsys.readouterr().out


def test_what_cannot_be_is_refused_before_scoring(folder, scored, tmp_path):  # noqa: F811
    other = tmp_path / "other.log"
    other.write_text("val_tokens:62021632\n" + scored.read_text())
    with pytest.raises(GolfError, match="other.log:1: scores of 62,021,632 tokens, --val holds"):
        reproduce.main(arguments(folder, other))
    other.write_text(scored.read_text() * 2)
    with pytest.raises(GolfError, match="holds 2 runs"):
        reproduce.main(arguments(folder, other))
    other.write_text("step:1/2 train_loss:5.6 train_time:9ms\n")
    with pytest.raises(GolfError, match="no score of the packed model"):
        reproduce.main(arguments(folder, other))
    with pytest.raises(GolfError, match="one of the two"):
        reproduce.main([])


def test_the_ways_of_the_records(shared):
    """Every published log: standard, sliding, test-time training, and the headline's repetition."""

    def of(path: Path):
        return [way for s, way in ways(read_run(path)) if s.name.endswith("_exact") or s.name.startswith("quantized")]

    assert of(shared / "logs/pr1182/train.log") == ["standard", "sliding", "", "ttt"]
    assert of(shared / "logs/pr2005/train_seed42.log") == ["standard", "sliding", "ttt"]
    assert of(shared / "logs/pr562/train.log") == ["ttt"]


def test_progress_tells_a_way_that_the_name_does_not():
    lines = ["step:1/2 train_loss:5 train_time:1ms", "final_eval_mode:sliding_window stride:64"]
    run = parse_log("\n".join([*lines, "final_int8_zlib_roundtrip val_loss:2.0 val_bpb:1.1", ""]), "x")[0]
    assert [way for _, way in ways(run)] == ["sliding"]


def test_exported_weights_score_as_the_artifact(folder, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "model.safetensors"
    assert artifact([str(folder / "artifact.golf"), "--export", str(file)]) == 0
    text = ["--val", str(folder / "val_*.bin"), "--tokenizer", str(folder / "tokenizer.model"), "--devices", "1"]
    scores = []
    for model in (file, folder / "artifact.golf"):
        evaluate.main([str(model), *text, "--json", str(tmp_path / "score.json")])
        scores.append(json.loads((tmp_path / "score.json").read_text())["nll_nats"])
    assert scores[0] == scores[1]
    whole = file.read_bytes()
    for altered in (whole.replace(b'\\"seq_len\\": 32', b'\\"seq_len\\": 16'), whole[:-2] + bytes([whole[-2] ^ 64]) + whole[-1:]):
        assert altered != whole
        file.write_bytes(altered)
        with pytest.raises(GolfError, match="model.safetensors: was altered since an artifact was exported to it"):
            evaluate.main([str(file), *text])
    with pytest.raises(GolfError, match="give a name that ends so"):
        artifact([str(folder / "artifact.golf"), "--export", str(tmp_path / "model.pt")])

"""python -m golf_jax.evaluate: from the artifact alone, with the right tokenizer only."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from evaluation.reference_models import Portable

from golf_jax import evaluate
from golf_jax.artifact.model import pack_model
from golf_jax.config import DataConfig, EvalConfig, GolfError, ModelConfig, QuantConfig, QuantRule, Recipe, ScoreFirstConfig, SlidingConfig
from golf_jax.data import corpus
from golf_jax.data.identity import identify
from golf_jax.data.shards import write_shard
from golf_jax.data.tokenizer import Tokenizer, train_bpe
from golf_jax.evaluation import METHODS
from golf_jax.evaluation.stream import first_documents
from golf_jax.files import sealed
from golf_jax.interop import open_model
from golf_jax.kernels.native import library
from golf_jax.mesh import make_mesh
from golf_jax.model import init_params

SEQ_LEN = 32
TEXT = [f"The {a} {b} of the {c} is {n}." for n in range(8) for a in ("old", "new") for b in ("king", "road") for c in ("sea", "hill")]


def tiny_recipe(vocab_size, **eval):
    model = ModelConfig(vocab_size=vocab_size, num_layers=2, width=16, num_heads=2, num_kv_heads=1, mlp_ratio=2.0)
    ttt = ScoreFirstConfig(stride=8, chunk_tokens=4 * SEQ_LEN, epochs=1, ranks=2)
    return Recipe(
        name="tiny",
        model=model,
        data=DataConfig(train="t", val="v", tokenizer="m", seq_len=SEQ_LEN),
        eval=EvalConfig(batch_rows=8, sliding=SlidingConfig(stride=8), score_first=ttt, **eval),
        quant=QuantConfig(rules=(QuantRule("", "float16"),)),
    )


def write_artifact(path, recipe, tokenizer):
    params = init_params(recipe.model, jax.random.key(0))
    path.write_bytes(pack_model(recipe, params, tokenizer.sha256, code_bytes=0).data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """artifact.golf, tokenizer.model, another.model with as many pieces, val_000.bin"""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "tokenizer.model").write_bytes(train_bpe(TEXT, 300))
    (root / "another.model").write_bytes(train_bpe([t.upper() for t in TEXT], 300))
    (root / "smaller.model").write_bytes(train_bpe(TEXT, 290))
    tokenizer = Tokenizer(root / "tokenizer.model")
    write_shard(root / "val_000.bin", np.concatenate(tokenizer.encode_documents(TEXT)))
    write_artifact(root / "artifact.golf", tiny_recipe(tokenizer.vocab_size), tokenizer)
    return root


def arguments(folder, *more, tokenizer="tokenizer.model"):
    text = ["--val", str(folder / "val_*.bin"), "--tokenizer", str(folder / tokenizer)]
    return [str(folder / "artifact.golf"), *text, *more]


@pytest.mark.parametrize("mode", ["standard", "sliding", "score_first"])
def test_every_mode_prints_score_facts_and_time(folder, mode, capsys, tmp_path):
    assert evaluate.main(arguments(folder, "--mode", mode, "--devices", "2", "--json", str(tmp_path / "r.json"))) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert f"{mode} val_loss:" in out and "C1 causal: ok" in out and "C2 normalized: ok" in out and "600 s limit" in out
    assert result["legal"] and not result["partial"] and result["facts"]["causal"] and result["facts"]["exactly_once"]
    # An untrained model knows nothing: uniform over the vocabulary, within a few per cent.
    assert result["val_loss"] == pytest.approx(np.log(300), rel=0.02)
    assert result["val_bpb"] == pytest.approx(result["nll_nats"] / np.log(2) / result["bytes"])
    assert (result["facts"]["updates"] > 0) == (mode == "score_first")


def test_a_quick_look_is_marked_partial(folder, capsys):
    evaluate.main(arguments(folder, "--max-docs", "8", "--devices", "1"))
    assert "sliding PARTIAL(" in capsys.readouterr().out


def test_a_result_is_kept_where_the_screen_is_full(folder, tmp_path):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    with contextlib.redirect_stdout(Full()):
        evaluate.main(arguments(folder, "--max-docs", "8", "--devices", "1", "--json", str(tmp_path / "x.json")))
    assert json.loads((tmp_path / "x.json").read_text())["partial"]


def test_text_that_the_run_was_trained_on_is_told_whatever_its_name(folder, capsys, tmp_path):
    for name in ("artifact.golf", "tokenizer.model"):
        shutil.copy(folder / name, tmp_path)
    shutil.copy(folder / "val_000.bin", tmp_path / "train_7.bin")
    write_shard(tmp_path / "val_a.bin", np.concatenate(Tokenizer(tmp_path / "tokenizer.model").encode_documents(TEXT[::-1])))
    shutil.copy(folder / "val_000.bin", tmp_path / "val_b.bin")
    stages = {"text": identify("", [tmp_path / "train_7.bin"], [tmp_path / "val_a.bin"])}
    (tmp_path / "stages.json").write_text(json.dumps(sealed(stages)))

    def told(glob):
        evaluate.main(
            [str(tmp_path), "--val", str(tmp_path / glob), "--max-docs", "8", "--devices", "1", "--json", str(tmp_path / "r.json")]
        )
        facts = [fact for fact in json.loads((tmp_path / "r.json").read_text())["text_facts"] if "trained on" in fact]
        assert all(capsys.readouterr().out.count(fact) == 2 for fact in facts)
        return facts

    some, whole = (
        "WARNING: the model was trained on 1 of the 2 files that it is scored on (val_b.bin is its train_7.bin)",
        "1 of the 1 files",
    )
    assert told("val_?.bin")[0].startswith(some) and whole in told("val_b.bin")[0] and not told("val_a.bin")


def test_documents_are_counted_by_their_first_token():
    tokens = np.array([1, 5, 6, 1, 7, 1, 8, 9])
    assert [first_documents(tokens, 1, n) for n in (1, 2, 3)] == [2, 4, 0]


@pytest.mark.parametrize(
    ("tokenizer", "message"), [("another.model", "SHA-256"), ("smaller.model", "290 pieces"), ("missing.model", "no such file")]
)
def test_a_wrong_tokenizer_is_refused(folder, tokenizer, message):
    with pytest.raises(GolfError, match=message):
        evaluate.main(arguments(folder, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.golf"], "nowhere.golf: cannot be read"),
        (["x.pt"], "x.pt"),
        (["/usr"], "/usr: holds no artifact.golf; give an artifact, or the directory of a run$"),
        (["nowhere.golf", "--json", "nowhere/x.json"], "nowhere/x.json: cannot be written .there is no directory .*nowhere"),
    ],
)
def test_mistakes_are_told_in_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GolfError, match=message) as caught:
        evaluate.main(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attention", ["native", "pallas"])
def test_an_attention_backend_that_does_not_run_here_is_refused(folder, attention):
    with pytest.raises(GolfError, match=f"'{attention}' does not run on cpu with head_dim 8"):
        evaluate.main(arguments(folder, "--attention", attention))


def test_an_attention_backend_that_cannot_be_built_is_refused_and_nothing_else_is_said(folder, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    library.begin.cache_clear()
    with pytest.raises(GolfError, match="--attention native: .*/bin/false cannot compile"):
        evaluate.main(arguments(folder, "--attention", "native"))
    library.begin.cache_clear()
    said = capsys.readouterr()
    assert "computes" not in said.out + said.err


def test_one_of_several_processes_is_watched_for_a_loss(folder, monkeypatch):
    """Else it would end with a stack dump of jax's runtime: see `golf_jax.supervise`."""
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    told = []
    monkeypatch.setattr(evaluate, "supervise", lambda advice: told.append(advice()) or 3)
    assert evaluate.main(arguments(folder)) == 3 and told == ["start all processes again"]


def test_negative_limits_are_refused():
    for name in ("max_docs", "max_tokens", "stride", "batch_rows"):
        with pytest.raises(GolfError, match=f"--{name.replace('_', '-')} must not be negative, got -1"):
            evaluate.Options("x", **{name: -1})


def test_missing_text_and_wide_stride_are_told(folder):
    with pytest.raises(GolfError, match="give the validation shards"):
        evaluate.main([str(folder / "artifact.golf")])
    with pytest.raises(GolfError, match="stride 64 exceeds the window of 32"):
        evaluate.main(arguments(folder, "--stride", "64"))


def test_a_damaged_artifact_is_refused_by_name(folder, tmp_path):
    data = bytearray((folder / "artifact.golf").read_bytes())
    data[-5] ^= 1
    (tmp_path / "bad.golf").write_bytes(data)
    with pytest.raises(GolfError, match=r"bad\.golf: "):
        evaluate.main([str(tmp_path / "bad.golf"), *arguments(folder)[1:]])


def test_a_fresh_process_in_another_folder_gives_the_same_score(folder, capsys, tmp_path):
    command = [sys.executable, "-m", "golf_jax.evaluate", *arguments(folder, "--devices", "1", "--mode", "standard")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    evaluate.main(arguments(folder, "--devices", "1", "--mode", "standard"))
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("standard val_loss:"))
    assert line in done.stdout
    wrong = subprocess.run([*command[:3], "nowhere.golf"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.strip() == "error: nowhere.golf: cannot be read (No such file or directory)"


def test_a_pytorch_checkpoint_is_scored(references, tmp_path):
    torch = pytest.importorskip("torch")
    case = Portable(638, references)
    torch.save({n: torch.from_numpy(x) for n, x in case.refs.case("params/main").own.items()}, tmp_path / "final_model.pt")
    (tmp_path / "small.py").write_text(
        "from dataclasses import replace\nfrom golf_jax.config import load_recipe\n"
        "def recipe():\n"
        "    r = load_recipe('pr638')\n"
        "    small = replace(r.model, vocab_size=48, width=24, num_heads=4, num_kv_heads=2, bigram_buckets=64, bigram_dim=8, rope_dims=4)\n"
        "    eval = replace(r.eval, sliding=replace(r.eval.sliding, stride=8))\n"
        "    return replace(r, model=small, data=replace(r.data, seq_len=32), eval=eval)\n"
    )
    subject = open_model(str(tmp_path / "final_model.pt"), str(tmp_path / "small.py"))
    assert subject.seq_len == 32 and subject.eval.sliding.windows == "tail"
    result = METHODS["standard"](subject, case.stream(), make_mesh(1), None)
    assert result.score.nll_nats == pytest.approx(case.sums("standard")[0], rel=1e-5)


def test_the_embedded_corpus_is_the_default_text_of_models_trained_on_it(folder, tmp_path, monkeypatch, capsys):
    recipe = tiny_recipe(300)
    embedded = replace(recipe, data=DataConfig(train="embedded", seq_len=SEQ_LEN))
    write_artifact(tmp_path / "a.golf", embedded, Tokenizer(folder / "tokenizer.model"))
    other = Tokenizer(folder / "tokenizer.model").encode_documents([line.replace("The", "Some") for line in TEXT])
    write_shard(folder / "train_000.bin", np.concatenate(other))
    monkeypatch.setattr(corpus, "build_embedded", lambda root, vocab: {"directory": str(folder)})
    evaluate.main([str(tmp_path / "a.golf"), "--mode", "standard", "--devices", "1"])
    assert "standard val_loss:" in capsys.readouterr().out


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        evaluate.main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--max-docs" in shown and "C3 scored before trained on" in shown and "A wrong tokenizer is refused" in shown


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [1024, 8192])
def test_fineweb_shards_and_both_tokenizers(shared, vocab, tmp_path, capsys):
    model = shared / "data" / "tokenizers" / f"fineweb_{vocab}_bpe.model"
    recipe = tiny_recipe(vocab)
    recipe = replace(recipe, data=replace(recipe.data, seq_len=2048), eval=EvalConfig(sliding=SlidingConfig(stride=64)))
    write_artifact(tmp_path / "a.golf", recipe, Tokenizer(model))
    val = str(shared / "data" / f"fineweb_sp{vocab}" / "fineweb_val_*.bin")
    evaluate.main([str(tmp_path / "a.golf"), "--val", val, "--tokenizer", str(model), "--max-docs", "4", "--devices", "1"])
    assert "sliding PARTIAL(" in capsys.readouterr().out

"""PR 2135 from documents to a score, as it ran and its legal variant, on one device, several devices and in two processes."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_recipes import build_text, on_text, tiny
from training.test_processes import losses, two_processes_agree_with_one

from golf_jax import pipeline
from golf_jax.config import QuantRule, Recipe
from golf_jax.data.sidecar import load_sidecar
from golf_jax.data.text import open_text
from golf_jax.evaluation import score
from golf_jax.mesh import make_mesh
from golf_jax.opening import load

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return build_text(tmp_path_factory.mktemp("text") / "data", transform="caseops")


def recipe_of(name: str, text: Path) -> Recipe:
    """Every part of the record, its quantizer on matrices this small included."""
    made = on_text(tiny(name, steps=8, vocab_size=300, seq_len=32), text)
    rules = (QuantRule("", "float16", max_numel=512), *made.quant.rules[1:])
    return replace(made, quant=replace(made.quant, rules=rules), budget=replace(made.budget, seconds=0.0, steps=8))


@pytest.mark.parametrize("name", ["pr2135", "pr2135_legal"])
def test_from_caseops_text_to_artifact_to_score(name, text, tmp_path):
    recipe = recipe_of(name, text)
    result = pipeline.run(recipe, pipeline.Options(run_dir=str(tmp_path / "run"), devices=2))
    log, scored = (tmp_path / "run/log.txt").read_text(), result["evaluations"]
    legal = name == "pr2135_legal"
    documents = scored["documents"]
    assert documents["legal"] is legal and documents["facts"]["exactly_once"] and documents["facts"]["order_violations"] == 0
    assert ("final_ILLEGAL_" in log) is (not legal) and ("packed" in scored) is (not legal)
    assert ("smear mixes the first token" in log) is (not legal)
    targets, counts = documents["tokens"], load_sidecar(text / "val_*.bin")
    assert counts is not None and documents["bytes"] == counts.counts[1 : targets + 1].sum() > 0  # of the original text
    assert recipe.eval.documents.seq_len > recipe.data.seq_len  # as 2560 after 2048
    assert documents["early_projection"]["share"] >= 0.01 and documents["seconds"]["hints"] > 0
    assert load(tmp_path / "run/artifact.golf").config.two_lanes_from == 3
    course = losses(tmp_path / "run")
    assert course[-1] < course[0]


@pytest.mark.parametrize("name", ["pr2135", "pr2135_legal"])
def test_two_processes_train_and_score_the_record_as_one(name, text, tmp_path, programs):
    """Packed documents, the global phase and the queue of documents, over 8 devices of two processes."""
    two_processes_agree_with_one(recipe_of(name, text), tmp_path, programs)


def test_eight_devices_score_as_one(text, tmp_path):
    """The same artifact on one, two and eight: the queue is a function of the text."""
    recipe, folder = recipe_of("pr2135_legal", text), tmp_path / "run"
    ran = pipeline.run(recipe, pipeline.Options(run_dir=str(folder), devices=1))["evaluations"]["documents"]
    d, model = recipe.data, load(folder)
    opened = open_text(d.train, d.val, d.tokenizer, recipe.model.vocab_size, d.seq_len)
    for devices in (2, 8):
        (result,) = score(model, opened, make_mesh(devices), recipe.eval, seq_len=d.seq_len, methods=["documents"])
        assert result.score.bpb == pytest.approx(ran["val_bpb"], rel=1e-5)
        facts = result.to_dict()["facts"]
        assert all(facts[name] == ran["facts"][name] for name in ("covered", "updates", "duplicates", "order_violations"))

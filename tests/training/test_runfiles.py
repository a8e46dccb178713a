"""Run files as checked values: what cannot be is told by file and field, whoever sealed it."""

import json

import made_runs
import pytest

from golf_jax.config import GolfError
from golf_jax.files import sealed
from golf_jax.training.runfiles import read_environment, read_metrics, read_result, read_stages


def altered(said, path, value):
    """`said` with another value at the dotted path; Ellipsis removes it."""
    said = json.loads(json.dumps(said))
    *parents, last = path.split(".")
    node = said
    for name in parents:
        node = node[name]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return said


def test_what_a_run_writes_is_read_as_it_is(tmp_path):
    said, rows = made_runs.stages() | {"more": 1}, [{"event": "train", "step": 1, "loss": None}, {"event": "score"}]
    (tmp_path / "stages.json").write_text(json.dumps(sealed(said)))
    (tmp_path / "result.json").write_text(json.dumps(made_runs.result()))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_stages(tmp_path) == said and read_result(tmp_path) == made_runs.result()
    assert read_environment(tmp_path) is None and read_metrics(tmp_path) == ([], [])
    with pytest.raises(FileNotFoundError):
        read_result(tmp_path / "none")


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("evaluations.standard.val_bpb", "1.1", "is '1.1', not a number"),
        ("evaluations.standard.val_bpb", -1, "is -1, not from 0 to 1e\\+12"),
        ("evaluations.standard.val_bpb", 10**400, "is 1000.*, not from 0"),
        ("evaluations.standard.tokens", 0, "is 0, not from 1 to"),
        ("evaluations.standard.tokens", 1.5, "is 1.5, not a whole number"),
        ("evaluations.standard.legal", 1, "is 1, not true or false"),
        ("evaluations.standard.facts.causal", "yes", "is 'yes', not true or false"),
        ("evaluations.standard.facts.covered", True, "is True, not a whole number"),
        ("evaluations.standard.seconds", [], r"is \[\], not an object"),
        ("evaluations.standard.facts", ..., "is missing"),
        ("evaluations", {}, "is {}, not of length 1 to 100"),
        ("evaluations", {"\x1b[2J": made_runs.evaluation()}, "a name in evaluations is .*x1b.*, not of length 1 to 200, printable"),
        ("pack.pre_quantization", None, "is None, not an object"),
        ("pack", ..., "tells evaluations and not pack, which comes first"),
        ("text.val", [{}], "text.val.0.name is missing"),
        ("changes", [{"field": "x", "before": 1}], "changes.0.after is missing"),
    ],
)
def test_a_sealed_value_that_cannot_be_is_refused_by_its_field(tmp_path, path, value, word):
    (tmp_path / "stages.json").write_text(json.dumps(sealed(altered(made_runs.stages(), path, value))))
    field = "" if word.startswith(("a name", "tells", "text.", "changes.")) else f"{path} "
    with pytest.raises(GolfError, match=f"stages.json: {field}{word}.*; remove it to repeat what follows training$"):
        read_stages(tmp_path)

"""Groups of runs, and when a difference is called more than noise."""

from dataclasses import replace

import pytest
from scipy.special import stdtr

from golf_jax.config import load_recipe, to_dict
from golf_jax.reporting.compare import common_method, compare, conclusion, differing, groups, seeds_needed
from golf_jax.reporting.record import Record


def record(seed, loss, lr=0.03, steps=100, methods=("standard", "sliding"), tokens=1000):
    recipe = replace(load_recipe("quickstart"), seed=seed)
    config = to_dict(recipe)
    config["optim"]["groups"][0]["lr"] = lr
    evaluations = {m: {"val_loss": loss, "val_bpb": loss / 2, "legal": True, "tokens": tokens, "bytes": 3000} for m in methods}
    return Record(
        path=None, name=f"{lr}-{seed}", recipe=recipe, config=config, stages={"train": {"steps": steps}, "evaluations": evaluations}
    )


def rows(candidate, reference=(3.0, 3.2, 3.1), **more):
    both = [record(s, x) for s, x in enumerate(reference)] + [record(s, x, lr=0.02, **more) for s, x in enumerate(candidate)]
    return compare(groups(both), "sliding")


def test_groups_and_differences():
    runs = [record(1, 3.0), record(1, 2.9, lr=0.02), record(2, 3.0)]
    assert [(g.label, [r.recipe.seed for r in g.runs]) for g in groups(runs)] == [
        ("optim.groups.0.lr=0.03", [1, 2]),
        ("optim.groups.0.lr=0.02", [1]),
    ]
    assert differing(runs) == [("optim.groups.0.lr", [0.03, 0.02, 0.03]), ("seed", [1, 1, 2])]
    assert common_method([*runs, record(3, 3.0, methods=("standard",))]) == "standard"


def test_a_gain_beyond_the_noise():
    """Seeds differ by 0.1, but the gain is the same for each: only the pairing by seed shows it."""
    reference, candidate = rows((2.901, 3.1, 2.999))
    assert reference.verdict == "reference" and reference.mean == pytest.approx(3.1) and reference.std == pytest.approx(0.1)
    assert candidate.gain == pytest.approx(0.1) and candidate.p is not None and candidate.p < 0.001
    assert candidate.verdict == "better beyond the noise"
    assert (
        conclusion([reference, candidate])
        == "Better than optim.groups.0.lr=0.03 beyond the noise: optim.groups.0.lr=0.02 by 0.10000 nats per token."
    )
    assert rows((3.101, 3.3, 3.199))[1].verdict == "worse beyond the noise"


def test_no_winner_below_the_noise():
    found = rows((2.9, 3.15, 3.08))
    assert found[1].gain is not None and found[1].gain > 0 and found[1].needed is not None and found[1].needed > 3
    assert found[1].verdict == f"within the noise; about {found[1].needed} seeds would be needed"
    assert conclusion(found) == "No setting is better than optim.groups.0.lr=0.03 beyond the noise."


def test_what_cannot_be_compared():
    assert rows((2.0, 2.2, 2.1), steps=200)[1].verdict == "not comparable: other numbers of steps"
    other = rows((2.0, 2.2, 2.1), tokens=1100)[1]  # of another tokenizer
    assert other.verdict == "not comparable in nats: other tokens or text" and other.gain is None and other.p is None
    assert rows((2.0, 2.2, 2.1), tokens=1001)[1].gain is not None
    assert rows((2.0,))[1].verdict.startswith("not testable") and rows((2.0,))[1].std is None


def test_more_comparisons_ask_for_more():
    """p = 0.006 passes alone, and not as one of two."""
    alone = rows((2.9, 3.074, 3.0))
    assert alone[1].p is not None and 0.005 < alone[1].p < 0.01 and alone[1].verdict.startswith("better")
    three = [record(s, x) for s, x in enumerate((3.0, 3.2, 3.1))]
    three += [record(s, x, lr=0.02) for s, x in enumerate((2.9, 3.074, 3.0))] + [
        record(s, x, lr=0.01) for s, x in enumerate((3.0, 3.1, 3.2))
    ]
    assert compare(groups(three), "sliding")[1].verdict.startswith("within the noise")


def test_seeds_needed_is_the_first_number_that_passes():
    n = seeds_needed(0.01, 0.02, 0.01)
    assert n is not None
    p = [2 * float(stdtr(k - 1, -0.01 / (0.02 / k**0.5))) for k in (n - 1, n)]
    assert p[0] >= 0.01 > p[1] and seeds_needed(0.0, 0.02, 0.01) is None

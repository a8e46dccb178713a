"""The shipped recipes: exact sizes, optimizer groups of the specifications, documentation, JSON."""

import importlib
import json

import pytest

from golf_jax.config import Recipe, from_dict, load_recipe, recipe_names, to_dict
from golf_jax.model.params import count, leaves
from golf_jax.optim.optimizer import route

PARAMETERS = {
    "baseline": 17_059_912,
    "pr372": 26_666_073,
    "pr562": 24_509_621,
    "pr638": 27_137_223,
    "pr1182": 27_108_468,
    "pr2005": 35_989_592,
    "pr2135": 35_945_673,
}
BATCH = dict.fromkeys(PARAMETERS, 786_432) | {"baseline": 524_288, "pr372": 524_288}
# (kind, learning rate, weight decay) of one parameter of each kind, from section 3 of the specifications.
GROUPS = {
    "baseline": {"q": ("muon", 0.04, 0), "tok_emb": ("adamw", 0.05, 0), "q_gain": ("adamw", 0.04, 0)},
    "pr372": {
        "up": ("muon", 0.02, 0.04),
        "bigram_proj": ("muon", 0.02, 0.04),
        "tok_emb": ("adamw", 0.03, 0),
        "bigram_table": ("adamw", 0.03, 0),
        "smear_gate": ("adamw", 0.02, 0),
    },
    "pr562": {
        "gate": ("muon", 0.02, 0.04),
        "gate_bias": ("adamw", 0.02, 0.04),
        "bigram_proj": ("muon", 0.02, 0.04),
        "bigram_table": ("adamw", 0.03, 0.04),
    },
    "pr638": {"gate": ("adamw", 0.025, 0.04), "bigram_proj": ("muon", 0.025, 0.04), "tok_emb": ("adamw", 0.035, 0.04)},
    "pr1182": {
        "o": ("muon", 0.025, 0.04),
        "bigram_proj": ("adamw", 0.025, 0.04),
        "ve_shared_table": ("adamw", 0.035, 0.04),
        "trigram_table": ("frozen", 0, 0),
        "trigram_proj": ("frozen", 0, 0),
    },
    "pr2005": {"q": ("muon", 0.022, 0.095), "tok_emb": ("adamw", 0.03, 0.085), "skip_gates": ("adamw", 0.02, 0.02)},
    "pr2135": {
        "o": ("muon", 0.028, 0.095),
        "tok_emb": ("adamw", 0.03, 0.085),
        "lane_post": ("adamw", 0.02, 0.02),
        "smear_w": ("adamw", 0.02, 0.02),
        "narrow_gate": ("adamw", 0.02, 0.02),
        "softcap_pos": ("frozen", 0, 0),
    },
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_those_of_the_run(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert count(recipe.model) == PARAMETERS[name]
    assert recipe.data.batch_tokens == BATCH[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_optimizer_groups_are_those_of_the_run(name):
    recipe = load_recipe(name)
    groups = route(recipe.optim, {leaf: info.role for leaf, info in leaves(recipe.model).items()})
    for leaf, want in GROUPS[name].items():
        g = groups[leaf]
        assert (g.kind, g.lr, g.weight_decay) == want, leaf


@pytest.mark.parametrize("name", PARAMETERS)
def test_docstring_says_how_to_run_it_and_what_to_expect(name):
    text = importlib.import_module(f"golf_jax.configs.{name}").__doc__
    assert f"python -m golf_jax.train {name}" in text
    assert f"{PARAMETERS[name]:,} parameters" in text
    assert all(word in text for word in ("bpb", "bytes", "ms per step", "steps"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_json_round_trip(name):
    recipe = load_recipe(name)
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_all_recipes_are_found_by_name():
    assert set(PARAMETERS) <= set(recipe_names())

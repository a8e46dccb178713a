"""The configuration: refusals that name the field, JSON round trip, no field that nobody reads."""

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import golf_jax
from golf_jax.config import (
    AdaptFirstConfig,
    BudgetConfig,
    DataConfig,
    EvalConfig,
    FakeQuantConfig,
    GolfError,
    GroupConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    QuantRule,
    Recipe,
    ScheduleConfig,
    ScoreFirstConfig,
    SlidingConfig,
    from_dict,
    load_recipe,
    parse_json,
    recipe_names,
    to_dict,
)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_survive_json(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(width=100), "model.width 100 is not divisible by model.num_heads 8"),
        (lambda: ModelConfig(num_kv_heads=3), "model.num_heads 8 is not divisible by model.num_kv_heads 3"),
        (lambda: ModelConfig(width=24, num_heads=8), "= 3 must be even for RoPE"),
        (lambda: ModelConfig(num_layers=0), "model.num_layers must be positive, got 0"),
        (lambda: ModelConfig(rope_dims=65), "model.rope_dims 65 must be even and at most the head dimension 64"),
        (lambda: ModelConfig(trigram="shared"), "'shared' needs model.bigram_buckets > 0"),
        (lambda: ModelConfig(trigram="table"), "model.trigram_buckets >= 2 go together"),
        (lambda: ModelConfig(value_embed_layers=(11,)), r"model.value_embed_layers \(11,\) must lie in 0..10"),
        (lambda: ModelConfig(loop_start=3), "model.loop_start and model.loop_repeats go together"),
        (lambda: ModelConfig(loop_start=5, loop_end=3, loop_repeats=1), "5..3 must lie in 0..10"),
        (lambda: ModelConfig(value_residual_first=True), "model.value_residual_first needs model.value_residual"),
        (lambda: DataConfig(ranks=0), "data.ranks must be positive, got 0"),
        (lambda: DataConfig(train="x"), "data.val is empty"),
        (lambda: OptimConfig(groups=(GroupConfig("a", ("x",), "muon"), GroupConfig("b", ("x",), "adamw"))), "claimed by two groups"),
        (lambda: OptimConfig(clip_per_rank=True, clip_norm=0), "optim.clip_per_rank needs optim.clip_norm > 0"),
        (lambda: BudgetConfig(seconds=0), "give budget.steps or a positive budget.seconds"),
        (lambda: ScheduleConfig(ema_decay=0), "schedule.export 'ema' needs schedule.ema_decay > 0"),
        (lambda: ScheduleConfig(export="swa"), "schedule.export 'swa' needs schedule.swa_every > 0"),
        (lambda: GroupConfig("m", ("matrix",), "muon", newton_schulz_steps=10**6), "newton_schulz_steps must be at most 100, got 1000000"),
        (lambda: QuantRule("", "int6_row", step=0), "step must be positive"),
        (lambda: Recipe("x", schedule=ScheduleConfig(fake_quant_below=0.1)), "model.fake_quant.matrices is 'none'"),
        (lambda: Recipe("x", micro_rows=7), "micro_rows 7 must divide or be a multiple of data.rows_per_rank 48"),
        (lambda: Recipe("x", micro_rows=24, optim=OptimConfig(clip_per_rank=True)), "leave micro_rows 0"),
        (
            lambda: Recipe("x", eval=EvalConfig(sliding=SlidingConfig(stride=4096))),
            "eval.sliding.stride 4096 exceeds the window of 2048 tokens",
        ),
        (
            lambda: Recipe("x", eval=EvalConfig(score_first=ScoreFirstConfig(epochs=1, chunk_tokens=8))),
            "eval.score_first.chunk_tokens 8 is less than one sequence of 2048",
        ),
        (lambda: ScoreFirstConfig(epochs=1, stride=0), "stride of test-time training must be positive, got 0"),
        (lambda: QuantConfig(gptq_batches=-1), "quant.gptq_batches must be >= 0, got -1"),
    ],
)
def test_impossible_combinations_name_the_field(make, message):
    with pytest.raises(GolfError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"depth": 3}, "Recipe: unknown field 'depth'; fields are budget, "),
        (lambda d: {k: v for k, v in d.items() if k != "name"}, "Recipe: field 'name' is missing"),
        (lambda d: d | {"seed": "7"}, "Recipe.seed: expected int, found '7'"),
        (lambda d: d | {"seed": True}, "Recipe.seed: expected int, found True"),
        (lambda d: d | {"micro_rows": None}, "Recipe.micro_rows: expected int, found None"),
        (lambda d: d | {"numerics": "exact"}, "Recipe.numerics: 'exact' is not one of 'as_run', 'fp32'"),
        (lambda d: d | {"model": 3}, "Recipe.model: expected an object, found int"),
        (lambda d: group(d, betas=[0.9]), "Recipe.optim.groups[1].betas: expected 2 values, found 1"),
        (lambda d: group(d, eps=float("nan")), "Recipe.optim.groups[1].eps: nan is not finite"),
    ],
)
def test_json_that_does_not_fit_names_the_place(change, message):
    with pytest.raises(GolfError, match=re.escape(message)):
        from_dict(Recipe, change(to_dict(load_recipe("quickstart"))))


def group(recipe: dict, **changes) -> dict:
    """Recipe data with its second group changed."""
    first, second, *others = recipe["optim"]["groups"]
    return recipe | {"optim": recipe["optim"] | {"groups": [first, second | changes, *others]}}


def test_a_whole_number_will_do_for_a_float():
    assert from_dict(BudgetConfig, {"seconds": 3}) == BudgetConfig(seconds=3.0)


@pytest.mark.parametrize("text", ["", "recipe = 3\n", "def recipe():\n    return 3\n"])
def test_a_file_that_is_no_recipe_is_refused(text, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(GolfError, match=r"recipe\(\)"):
        load_recipe(str(file))


@pytest.mark.parametrize(
    "cls",
    [ModelConfig, FakeQuantConfig, DataConfig, GroupConfig, OptimConfig, BudgetConfig, ScheduleConfig, QuantRule, QuantConfig]
    + [SlidingConfig, ScoreFirstConfig, AdaptFirstConfig, EvalConfig, Recipe],
)
def test_every_field_has_a_reader(cls):
    """Somewhere outside the configuration, or in one of its properties; a field that nobody reads is a lie."""
    root = Path(golf_jax.__file__).parent
    sources = "".join(p.read_text() for p in root.rglob("*.py") if "config" not in p.parts and "interop" not in p.parts)
    properties = "".join(re.findall(r"@property\n.*?(?=\n    @|\nclass|\n\n\n|\Z)", (root / "config/model.py").read_text(), re.S))
    properties += "".join(re.findall(r"@property\n.*?(?=\n    @|\n\n\n|\Z)", (root / "config/recipe.py").read_text(), re.S))
    unread = [f.name for f in dataclasses.fields(cls) if not re.search(rf"\.{f.name}\b", sources + properties)]
    assert not unread


def test_layer_order_of_depth_recurrence():
    """PR 2005: layers 3 to 5 three times, halves of the whole."""
    model = load_recipe("pr2005").model
    assert model.layer_order(False) == ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10))
    assert model.layer_order(True) == ((0, 1, 2, 3, 4, 5, 3, 4), (5, 3, 4, 5, 6, 7, 8, 9, 10))
    assert model.num_skips == 8
    assert replace(load_recipe("pr638").model).num_skips == 5


@pytest.mark.parametrize("text", ["NaN", '{"a": -Infinity}', "1e999", "[" * 100_000, b"\xff", "", '{"a": {"b": 1, "b": 2}}'])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(GolfError, match="not JSON"):
        parse_json(text)

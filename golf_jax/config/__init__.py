"""Configuration: frozen dataclasses, validated on construction, JSON round trip.

A recipe is a file in `configs/` with a function `recipe() -> Recipe`. Every field has one reader; combinations that cannot work are
refused here, before anything is compiled, in one line that names the field and the fix.
"""

from golf_jax.config.base import CAP_BYTES, GolfError, escape, parse_json
from golf_jax.config.model import FakeQuantConfig, ModelConfig
from golf_jax.config.recipe import (
    AdaptFirstConfig,
    BudgetConfig,
    DataConfig,
    EvalConfig,
    GroupConfig,
    OptimConfig,
    QuantConfig,
    QuantRule,
    Recipe,
    ScheduleConfig,
    ScoreFirstConfig,
    SlidingConfig,
    TTTConfig,
)
from golf_jax.config.serialize import differences, from_dict, load_recipe, recipe_names, to_dict

__all__ = [
    "CAP_BYTES",
    "AdaptFirstConfig",
    "BudgetConfig",
    "DataConfig",
    "EvalConfig",
    "FakeQuantConfig",
    "GolfError",
    "GroupConfig",
    "ModelConfig",
    "OptimConfig",
    "QuantConfig",
    "QuantRule",
    "Recipe",
    "ScheduleConfig",
    "ScoreFirstConfig",
    "SlidingConfig",
    "TTTConfig",
    "differences",
    "escape",
    "from_dict",
    "load_recipe",
    "parse_json",
    "recipe_names",
    "to_dict",
]

"""Configuration: frozen dataclasses, validated on construction, JSON round trip.

A recipe is a file in `configs/` with a function `recipe() -> Recipe`. Every field has one reader; combinations that cannot work are
refused here, before anything is compiled, in one line that names the field and the fix.
"""

from golf_jax.config.base import CAP_BYTES, LIMIT_SECONDS, GolfError, escape, named, parse_json
from golf_jax.config.evaluation import (
    AdaptFirstConfig,
    DocumentsConfig,
    EvalConfig,
    PackedConfig,
    ScoreFirstConfig,
    SlidingConfig,
    TiltConfig,
    TTTConfig,
)
from golf_jax.config.model import FakeQuantConfig, ModelConfig
from golf_jax.config.recipe import (
    BudgetConfig,
    DataConfig,
    GroupConfig,
    LowRankConfig,
    OptimConfig,
    QuantConfig,
    QuantRule,
    Recipe,
    ScheduleConfig,
)
from golf_jax.config.serialize import differences, from_dict, load_recipe, recipe_names, to_dict

__all__ = [
    "CAP_BYTES",
    "LIMIT_SECONDS",
    "AdaptFirstConfig",
    "BudgetConfig",
    "DataConfig",
    "DocumentsConfig",
    "EvalConfig",
    "FakeQuantConfig",
    "GolfError",
    "GroupConfig",
    "LowRankConfig",
    "ModelConfig",
    "OptimConfig",
    "PackedConfig",
    "QuantConfig",
    "QuantRule",
    "Recipe",
    "ScheduleConfig",
    "ScoreFirstConfig",
    "SlidingConfig",
    "TTTConfig",
    "TiltConfig",
    "differences",
    "escape",
    "from_dict",
    "load_recipe",
    "named",
    "parse_json",
    "recipe_names",
    "to_dict",
]

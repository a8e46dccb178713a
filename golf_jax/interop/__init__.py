"""Exchange with PyTorch: checkpoints and hyperparameters of the five pull requests."""

from golf_jax.interop.hparams import model_config, training_recipe
from golf_jax.interop.torch_names import from_torch, to_torch

__all__ = ["from_torch", "model_config", "to_torch", "training_recipe"]

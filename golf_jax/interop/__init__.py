"""Exchange with PyTorch: checkpoints, packed files and hyperparameters of the records' scripts."""

from golf_jax.interop.hparams import model_config
from golf_jax.interop.opened import export_artifact, open_model
from golf_jax.interop.torch_names import from_torch, open_torch, to_torch

__all__ = ["export_artifact", "from_torch", "model_config", "open_model", "open_torch", "to_torch"]

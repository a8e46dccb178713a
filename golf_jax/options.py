"""What a run is asked besides its recipe. No jax here: `train --help` must not wait for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    run_dir: str = ""
    """Directory of this run; default runs/<recipe>-<time>."""
    resume: str = ""
    """Run directory to go on with, at the first stage that is not done. Recipe and options come from there."""
    accept: tuple[str, ...] = ()
    """With --resume: fields that may differ although they change what has been trained (optim.groups.0.lr); the result says so."""
    devices: int = 0
    """Devices to use; 0: all. Of a CPU this many are made; 0: about one per core."""
    emulate_devices: int = 0
    """Reproduce the data order of this many ranks, with the same tokens per step (the recipes' own number is 8)."""
    score: str = ""
    """Score this artifact on the recipe's text, and train nothing."""
    tracker: str = ""
    """Send the rows of metrics.jsonl to `tensorboard` (files in the run directory) or `wandb`, too; default: nowhere."""
    profile: int = 0
    """Write a trace of this many training steps to the run directory (jax.profiler: TensorBoard, Perfetto); 0: none."""

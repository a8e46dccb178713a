"""What commands are asked besides a recipe. No jax here: `--help` must not wait for it."""

from dataclasses import dataclass

from golf_jax.config.base import check


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

    def __post_init__(self) -> None:
        check(self.profile >= 0, f"profile must not be negative, got {self.profile}")
        check(bool(self.resume) or not self.accept, "--accept is for what differs from a run: give --resume RUN, too")
        for name in ("run_dir", "score"):
            flag = f"--{name.replace('_', '-')}"
            check(not (self.resume and getattr(self, name)), f"--resume {self.resume}: goes on in its own directory; leave {flag} out")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """Logits are divided by it; 0: always the likeliest token."""
    top_k: int = 0
    """Only among the K likeliest tokens; 0: all."""
    top_p: float = 0.95
    """Only among the likeliest tokens that together reach this probability; 1: all."""
    seed: int = 0
    """Of the random numbers: the same seed gives the same text."""

    def __post_init__(self) -> None:
        check(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}")
        check(self.top_k >= 0, f"top-k must not be negative, got {self.top_k}")
        check(abs(self.seed) < 1 << 53, f"seed {self.seed} is too large a number")
        check(0 < self.top_p <= 1, f"top-p must lie above 0 and be at most 1, got {self.top_p}")


@dataclass(frozen=True)
class Author:
    """What no run can say of a submission."""

    author: str
    github_id: str
    name: str = ""
    """Of the submission; default: that of the recipe."""
    blurb: str = ""
    """What is new, in a sentence or two."""

"""Cross-framework checks: one function per section of a reference set, `(Case) -> None`, that compares what it computes."""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from golf_jax.config import GolfError
from golf_jax.interop.checks.evaluation import check_eval, check_ttt
from golf_jax.interop.checks.forward import check_grads, check_model
from golf_jax.interop.checks.init import check_init
from golf_jax.interop.checks.optimizers import check_newton_schulz, check_optimizer
from golf_jax.interop.checks.quantization import check_quant
from golf_jax.interop.checks.schedule import check_loader, check_schedule
from golf_jax.interop.checks.training import check_train
from golf_jax.interop.checks.units import check_units
from golf_jax.interop.comparison import MALFORMED, CheckResult
from golf_jax.interop.reference import Case, NotComputed, Set

CHECKS: dict[str, Callable[[Case], None]] = {
    "model": check_model, "grads": check_grads, "newton_schulz": check_newton_schulz, "optimizer": check_optimizer, "init": check_init,
    "schedule": check_schedule, "loader": check_loader, "train": check_train, "quant": check_quant, "eval": check_eval,
    "ttt": check_ttt, "units": check_units,
}  # fmt: skip


@contextlib.contextmanager
def _quick_compilation() -> Iterator[None]:
    """On a CPU the unrolled small models of the references take far longer to optimise than to run."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu" or before)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def run(refs: Set, section: str) -> Iterator[CheckResult]:
    """The results of a section; what it cannot compute is listed in `refs.not_checked`. GolfError for a damaged set."""
    for case in refs.cases(section):
        try:
            # An optimizer's updates are compiled as a run compiles them: fused, they round once in bfloat16.
            with contextlib.nullcontext() if section == "optimizer" else _quick_compilation():
                CHECKS[section](case)
        except NotComputed as e:
            refs.not_checked[case.where] = str(e)
        except GolfError as e:
            known = str(refs.path) in str(e)
            raise e if known else GolfError(f"{refs.path}: {case.where}: {e}") from None
        except MALFORMED as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            told = f"{type(e).__name__}: {e}; {Path(at.filename).name}, line {at.lineno}"
            raise GolfError(f"{refs.path}: {case.where}: not what the format asks for ({told})") from e
        yield from case.results()


__all__ = ["CHECKS", "CheckResult", "Set", "run"]

"""Checkpoints of a training: orbax, asynchronous, with everything that a run needs to go on bit for bit.

Orbax checks its own bookkeeping, not the arrays, so `meta` carries a digest of every array and a digest of itself: a flipped bit, or the
arrays of one step beside the meta of another, are found before anything is trained on.
"""

import errno
import functools
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from golf_jax.ahead import ahead
from golf_jax.config import GolfError
from golf_jax.files import sealed, sync
from golf_jax.mesh import ROWS, run_rarely
from golf_jax.processes import from_main
from golf_jax.training.runfiles import checked_meta
from golf_jax.training.state import TrainState

FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))  # a quota is the disk of its user
KEPT = 2
PRIMES = (2654435761, 2246822519)


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read and proved."""

    state: TrainState
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return self.meta["step"]


def digests(tree: Any) -> tuple[Any, Any]:
    """(two uint32 of the bits of every array, [2] each; whether every float is finite, []).

    Sums of bits times odd numbers that depend on the position, modulo 2^32: computed where the arrays lie, the same for every sharding,
    different after any change of a single element. Zeros count nothing, so the padding of Muon's batches may change.
    """

    def one(x: jax.Array) -> jax.Array:
        bits = x.view(jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32).astype(jnp.uint32)
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.stack([jnp.sum(bits * ((index * np.uint32(p)) | 1), dtype=jnp.uint32) for p in PRIMES])

    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jax.tree.map(one, tree), jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


@functools.cache
def _digests() -> Any:
    return jax.jit(digests, compiler_options=run_rarely(jax.default_backend()))


def _named_digests(state: TrainState) -> tuple[dict[str, list[int]], bool]:
    tree, finite = jax.device_get(_digests()(state._asdict()))
    named = {keystr(path): [int(v) for v in value] for path, value in tree_leaves_with_path(tree)}
    return named, bool(finite)


def digest_ahead(shapes: TrainState) -> None:
    """Begin to compile what the first save needs."""
    ahead(lambda: _digests().lower(shapes._asdict()).compile())


def _orbax() -> Any:
    """orbax.checkpoint, loaded when a state is saved or looked for: a fifth of what a start imports, and none of it for step 1."""
    import orbax.checkpoint

    return orbax.checkpoint


@functools.cache
def _set_up() -> None:
    """How orbax is to behave.

    A failure is raised here, as one line; orbax and asyncio log it, too, and tensorstore's threads print dozens of tracebacks of it.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # orbax's, beside an error that is told
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def told(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of orbax: reads of further arrays, beside the one whose damage is told
        if str(unraisable.exc_value) != "Event loop is closed" and not (code and "orbax" in Path(code.co_filename).parts):
            hook(unraisable)

    sys.unraisablehook = told
    # Not a slice of every array by every device that holds it: each would be a program of its own, compiled at the first save.
    ocp = _orbax()
    ocp.type_handlers.register_type_handler(jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True)


class Checkpoints:
    """The newest checkpoints under `directory`: the train state as arrays, position and clock as JSON. Nothing is pickled."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).absolute()
        self._last = self._synced = 0  # step of the save under way, and of the one that would outlive a power loss
        with self._reported("cannot be opened"):
            self.directory.mkdir(parents=True, exist_ok=True)  # orbax finds out that it is a file when the first save is due

    @functools.cached_property
    def _manager(self) -> Any:
        with self._reported("cannot be opened"):
            _set_up()
            options = _orbax().CheckpointManagerOptions(max_to_keep=KEPT, create=True, cleanup_tmp_directories=True)
            return _orbax().CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: TrainState, *, wait: bool = False, **facts: Any) -> None:
        """Start saving; returns once the arrays are copied out (`wait`: once they are on disk).

        facts: JSON data for `Found.meta` (recipe, position, seconds, ...). Raises GolfError: a state that is not finite is never
        saved; a disk that is full, also for the save before, unless `wait` has told that one.
        """
        named, finite = _named_digests(state)
        if not finite:
            raise GolfError(f"step {step}: the weights are not finite any more; nothing is saved from here on")
        meta = sealed({"step": step, "digests": named, **facts})
        args = _orbax().args
        both = args.Composite(state=args.StandardSave(state._asdict()), meta=args.JsonSave(meta))
        self._last = step
        with self._written(f"checkpoint {step} cannot be written"):
            self._manager.save(step, args=both, force=True)
        if wait:
            self.wait()

    def steps(self) -> list[int]:
        """Steps of all checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def restore(self, like: TrainState, log: Any = print) -> Found | None:
        """The newest sound checkpoint, laid out like `like` (arrays or shapes with shardings); None if there is none.

        The number of devices may be another: Muon's batches are cut or padded, by the matrices of zeros that fill them up (`StackLayout`).
        A damaged one is named, set aside as `STEP.damaged`, and the one before is taken. Raises GolfError if all are damaged.
        """
        damaged = []
        for step in self.steps():
            try:
                return self._restore(step, like)
            except GolfError as error:
                damaged.append(step)
                aside = self.set_aside(step, "damaged")
                log(f"checkpoint {step} is damaged and set aside as {aside}: {error}")
        if damaged:
            raise GolfError(f"{self.directory}: no checkpoint can be read ({', '.join(map(str, damaged))} are damaged); start a new run")
        return None

    def _restore(self, step: int, like: TrainState) -> Found:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict())
        with self._reported(f"checkpoint {step} cannot be read"):
            if odd := [p for p in (self.directory / str(step)).rglob("*") if not (p.is_file() or p.is_dir())]:
                raise GolfError(f"checkpoint {step}: {odd[0]} is no regular file")  # opening a pipe would block for ever
            args = _orbax().args
            meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
            meta = checked_meta(meta, step)
            folder: Any = self.directory / str(step) / "state"
            check_same_shapes(abstract, _orbax().StandardCheckpointHandler().metadata(folder).tree)
            # Not strict: what the check lets through is padding, which orbax cuts or fills with zeros.
            restored = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(abstract, strict=False)))["state"]
            state = TrainState(**restored)
            named, _ = _named_digests(state)
            if wrong := [name for name, value in named.items() if meta["digests"].get(name) != value]:
                raise GolfError(f"checkpoint {step}: {wrong[0]} is not what was saved ({len(wrong)} of {len(named)} arrays)")
            self._synced = step
            return Found(state, meta)

    def set_aside(self, step: int, why: str) -> Path:
        """Rename a checkpoint to `STEP.why`, where it is not looked for any more."""
        source = self.directory / str(step)
        target = next(p for n in range(1000) if not (p := self.directory / f"{step}.{why}{n or ''}").exists())
        self._manager.close()
        if jax.process_index() == 0:
            source.rename(target)
        from_main("renamed")  # the others look only afterwards
        del self._manager  # opened again when it is next used
        return target

    def wait(self) -> None:
        """Until the save under way is on disk. Raises GolfError if it failed.

        Orbax syncs the arrays alone: a machine that loses its power would find the facts beside them empty.
        """
        with self._written(f"checkpoint {self._last} cannot be written"):
            self._manager.wait_until_finished()
            folder = self.directory / str(self._last)
            if jax.process_index() == 0 and self._synced != self._last and folder.is_dir():
                for path in (*folder.rglob("*"), folder, self.directory):
                    sync(path)
                self._synced = self._last

    def close(self) -> None:
        """Wait, and let go. A failure is told by `save` and `wait`; it must not hide here what else has happened."""
        for last in ("wait_until_finished", "close") if "_manager" in vars(self) else ():
            with suppress(Exception):
                getattr(self._manager, last)()
        self._remove_halves()  # also what a thread of tensorstore wrote on while it was removed before

    def _remove_halves(self) -> None:
        for half in self.directory.glob("*.orbax-checkpoint-tmp") if jax.process_index() == 0 else ():
            shutil.rmtree(half, ignore_errors=True)

    @contextmanager
    def _written(self, what: str) -> Iterator[None]:
        """Reported, and on a full disk half a checkpoint takes no room any more, nor one that is older than the newest."""
        try:
            with self._reported(what):
                yield
        except GolfError as error:
            with suppress(Exception):  # told above; what fails beside the arrays fails while orbax still writes them where it is removed
                self._manager._wait_for_checkpointers()  # no public way to it
            self._remove_halves()
            there = sorted(int(path.name) for path in self.directory.glob("*") if path.name.isdigit())  # orbax has given up some already
            if jax.process_count() > 1 or not any(full in str(error) for full in FULL) or len(there) < 2:
                raise
            # The newest that is whole stays: what has just failed may lie there under its own name, unsynced or without its facts.
            newest = max((step for step in there if step <= self._synced), default=there[-1])
            for step in set(there) - {newest}:
                shutil.rmtree(self.directory / str(step), ignore_errors=True)
            self._manager.reload()
            older = [str(step) for step in there if step < newest]
            raise GolfError(f"{error}; {', '.join(older)} given up for room" if older else str(error)) from error

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        """Whatever orbax and tensorstore raise, as one line."""
        try:
            yield
        except GolfError:
            raise
        except Exception as error:
            detail = next(iter(str(error).splitlines()), type(error).__name__)
            if code := re.search(r"os_error_code='(\d+)'", detail):  # behind all the paths that tensorstore names
                detail = os.strerror(int(code[1]))
            detail = next((full for full in FULL if full in detail), detail)
            raise GolfError(f"{self.directory}: {what} ({detail[:300]})") from error


def check_same_shapes(like: Any, stored: Any) -> None:
    """Raises ValueError unless both trees have leaves of the same shapes, up to the padding of what is split over devices.

    like: shapes with shardings. Leaves are compared by name: orbax stores a named tuple as a dictionary, whose order is another.
    """
    wanted, there = ({keystr(path, simple=True, separator="."): x for path, x in tree_leaves_with_path(tree)} for tree in (like, stored))
    if odd := sorted(wanted.keys() ^ there.keys()):
        raise ValueError(f"{odd[0]} is only {'here' if odd[0] in wanted else 'there'}")
    for name, mine in wanted.items():
        theirs = there[name]
        first = 1 if mine.sharding.spec == ROWS else 0
        if mine.shape[first:] != theirs.shape[first:]:
            raise ValueError(f"{name} has the shape {theirs.shape} there and {mine.shape} here")

"""Reads batches ahead in a thread and puts them on the devices while the previous step runs."""

import queue
import threading
import time
from types import TracebackType

import jax
from jax.sharding import Mesh

from golf_jax.config import GolfError
from golf_jax.data.loader import Batch, Loader
from golf_jax.mesh import AXIS, rows


def local_rows(mesh: Mesh, num_rows: int) -> slice:
    """The rows of a batch [num_rows, ...], sharded over the mesh axis `data`, that this process has to read."""
    if num_rows % mesh.shape[AXIS]:
        raise GolfError(f"batch of {num_rows} sequences does not divide over {mesh.shape[AXIS]} devices")
    indices = rows(mesh).addressable_devices_indices_map((num_rows,)).values()
    ordered = sorted({index[0].indices(num_rows)[:2] for index in indices if index is not None})
    if any(before[1] != after[0] for before, after in zip(ordered, ordered[1:], strict=False)):
        raise GolfError("mesh: the devices of a process must hold neighbouring rows; build it in process order")
    return slice(ordered[0][0], ordered[-1][1])


def place_batch(mesh: Mesh, loader: Loader, batch: Batch) -> Batch:
    """This process's rows as its part of the global batch on the mesh."""
    return jax.tree.map(lambda local: jax.make_array_from_process_local_data(rows(mesh), local, loader.global_shape), batch)


class Prefetcher:
    """Iterator of `Batch`, [ranks * rows, seq_len] sharded over `data`, `depth` batches ahead of the caller.

    The loader must be restricted to `local_rows(mesh, ...)` (with one process: all rows). After construction it belongs to the
    thread; ask `state()` here for the position. An error of the thread is raised by the next call. Use as a context manager.
    """

    def __init__(self, loader: Loader, mesh: Mesh, depth: int = 2) -> None:
        expected = local_rows(mesh, loader.global_shape[0])
        if loader.row_slice != expected:
            raise GolfError(f"data loader reads rows {loader.row_slice}, this process places rows {expected}")
        self._loader, self._mesh = loader, mesh
        self._state = loader.state()
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._read = self._taken = 0
        self._met: BaseException | None = None  # by the thread; becomes `_error` when its turn comes
        self._thread = threading.Thread(target=self._work, name="golf_jax-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                self._put((place_batch(self._mesh, self._loader, self._loader.next_batch()), self._loader.state()))
                self._read += 1
        except BaseException as error:  # whatever it is, it belongs to the consumer
            self._met = error
            self._put(error)

    def _put(self, item: object) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise GolfError("prefetcher: closed")
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._error = item
            raise item
        batch, self._state = item
        self._taken += 1
        return batch

    def trouble(self, ahead: int) -> BaseException | None:
        """The error that comes instead of one of the next `ahead` (at most `depth`) batches; waits until they are read."""
        while (met := self._met) is None and self._read - self._taken < ahead:
            time.sleep(0.001)
        return met if self._read - self._taken < ahead else None

    def state(self) -> dict[str, int]:
        """The loader position behind the batch returned last (not behind those read ahead): what a checkpoint stores."""
        return dict(self._state)

    def close(self) -> None:
        """Stops the thread and drops what it read ahead. May be called twice."""
        self._stop.set()
        self._thread.join()
        while not self._queue.empty():
            self._queue.get_nowait()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

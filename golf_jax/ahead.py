"""Compiled programs kept by what they were made of, and made in threads before they are asked for.

XLA lets go of the interpreter while it compiles, so another core makes the next programs while the first one traces, reads or trains.
"""

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

_pool: ThreadPoolExecutor | None = None
_asked: list[Future[None]] = []


@contextlib.contextmanager
def compiling_ahead(threads: int) -> Iterator[None]:
    """Within it `ahead` has effect, if there are any threads. At its end what has not begun is dropped, and what has is waited for."""
    global _pool
    if threads < 1:
        yield
        return
    _pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")
    try:
        yield
    finally:
        _pool.shutdown(cancel_futures=True)
        _pool = None
        _asked.clear()


def ahead(make: Callable[..., Any], *args: Any) -> None:
    """Begin make(*args), which keeps what it makes, in a thread of `compiling_ahead`; without one, do nothing.

    What goes wrong there is told where the program is asked for, by the call that then makes it again.
    """
    if _pool is not None:
        _asked.append(_pool.submit(_quietly, make, *args))


def beside(make: Callable[..., Any], *args: Any) -> None:
    """`ahead` in a thread of its own, while nothing else keeps the cores busy. A command that ends meanwhile does not wait (`busy`)."""
    threading.Thread(target=_quietly, args=(make, *args), name="beside", daemon=True).start()


def busy() -> bool:
    """Whether something begun by `beside` is not done: XLA cannot be asked to stop, nor the process be taken down around it."""
    return any(thread.name == "beside" for thread in threading.enumerate())


def _quietly(make: Callable[..., Any], *args: Any) -> None:
    with contextlib.suppress(Exception):
        make(*args)


def all_made() -> None:
    """Wait for everything that `ahead` was given."""
    wait(_asked)


class Kept(Generic[Result]):
    """What `kept` makes of a function."""

    def __init__(self, make: Callable[..., Result], most: int) -> None:
        functools.update_wrapper(self, make)
        self._make, self._most = make, most
        self._results: OrderedDict[Hashable, Future[Result]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Result:
        with self._lock:
            mine = args not in self._results
            result = self._results.setdefault(args, Future())
            self._results.move_to_end(args)
            if len(self._results) > self._most:
                self._results.popitem(last=False)
        if mine:
            try:
                result.set_result(self._make(*args))
            except BaseException as error:
                with self._lock:
                    self._results.pop(args, None)  # the next one who asks tries again
                result.set_exception(error)
        return result.result()

    def take(self, *args: Any) -> Result:
        """What was made of `args`, or is being made, for this caller alone, and what nobody has asked for let go; made now if need be."""
        with self._lock:
            begun = self._results.pop(args, None)
            self._results.clear()
        return begun.result() if begun else self._make(*args)

    def cache_clear(self) -> None:
        with self._lock:
            self._results.clear()


def kept(most: int) -> Callable[[Callable[..., Result]], Kept[Result]]:
    """Decorator like functools.lru_cache, for positional arguments: threads that ask for the same thing at a time make it once."""
    return lambda make: Kept(make, most)

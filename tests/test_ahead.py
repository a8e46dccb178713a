"""Programs made in threads before they are asked for."""

import threading
import time

import pytest

from golf_jax.ahead import ahead, all_made, beside, busy, compiling_ahead, kept


def test_what_two_threads_ask_for_is_made_once():
    made, begun, go = [], threading.Event(), threading.Event()

    @kept(2)
    def program(name):
        begun.set()
        assert go.wait(10)
        made.append(name)
        return object()

    with compiling_ahead(1):
        ahead(program, "a")
        assert begun.wait(10)  # it is being made while this thread asks for it, too
        threading.Timer(0.05, go.set).start()
        assert program("a") is program("a")
        ahead(program, "b")
        all_made()
    assert made == ["a", "b"]
    program("c"), program("b"), program("a")
    assert made == ["a", "b", "c", "a"]  # the two that were asked for last are kept


def test_what_is_taken_is_nobody_elses():
    """One state is donated to one training."""
    made, begun, go = [], threading.Event(), threading.Event()

    @kept(2)
    def state(name):
        begun.set()
        assert go.wait(10)
        made.append(name)
        return object()

    beside(state, "a")
    assert begun.wait(10)
    threading.Timer(0.05, go.set).start()
    first = state.take("a")  # begun above
    assert made == ["a"] and state.take("a") is not first and made == ["a", "a"]
    state("b"), state.take("c")
    assert state.take("b") and made == ["a", "a", "b", "c", "b"]  # what nobody took was let go


def test_a_failure_is_told_where_the_program_is_asked_for():
    tried = []

    @kept(2)
    def program(name):
        tried.append(name)
        raise ValueError(name)

    with compiling_ahead(1):
        ahead(program, "a")
        all_made()
        assert tried == ["a"]
        with pytest.raises(ValueError, match="a"):
            program("a")
    assert tried == ["a", "a"]


def test_without_threads_nothing_is_begun():
    ahead(pytest.fail, "was called")
    with compiling_ahead(0):
        ahead(pytest.fail, "was called")
        all_made()


def test_beside_needs_no_pool_and_keeps_failures_for_who_asks():
    threads = []

    @kept(1)
    def program(name):
        threads.append(threading.current_thread())
        raise ValueError(name)

    beside(program, "a")
    while busy():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="a"):
        program("a")
    assert len(threads) == 2 and threads[0] is not threads[1]

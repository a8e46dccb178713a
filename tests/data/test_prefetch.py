"""Prefetching: right rows on right devices, exact position, errors of the thread, clean end."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import PartitionSpec

import golf_jax
from golf_jax.config import GolfError
from golf_jax.data.loader import StreamLoader
from golf_jax.data.prefetch import Prefetcher, local_rows
from golf_jax.mesh import make_mesh


@pytest.fixture
def mesh():
    return make_mesh(8)


def make(tokens=5000, **options):
    return StreamLoader([np.arange(tokens, dtype=np.uint16)], ranks=8, rows=2, seq_len=16, **options)


def test_batches_arrive_in_order_sharded_over_the_devices(mesh):
    reference = make()
    with Prefetcher(make(), mesh) as ahead:
        for _ in range(4):
            for placed, rows in zip(next(ahead)[:2], reference.next_batch()[:2], strict=True):
                assert placed.sharding.spec == PartitionSpec("data") and placed.dtype == np.int32
                for shard in placed.addressable_shards:
                    np.testing.assert_array_equal(shard.data, rows[shard.index])
                assert [shard.data.shape for shard in placed.addressable_shards] == [(2, 16)] * 8


def test_state_is_that_of_the_consumed_batch_and_resumes_exactly(mesh):
    with Prefetcher(make(), mesh) as ahead:
        assert ahead.state()["batches"] == 0
        first = [next(ahead) for _ in range(3)]
        state = ahead.state()
        following = next(ahead)
    assert len(first) == state["batches"] == 3
    loader = make()
    loader.restore(state)
    with Prefetcher(loader, mesh) as resumed:
        np.testing.assert_array_equal(next(resumed)[0], following[0])


def test_an_error_of_the_thread_reaches_the_consumer_behind_the_good_batches(mesh):
    loader = make(vocab_size=600)  # the second batch has tokens up to 527, the third up to 791
    with Prefetcher(loader, mesh) as ahead:
        next(ahead), next(ahead)
        for _ in range(2):
            with pytest.raises(GolfError, match="outside a vocabulary of 600"):
                next(ahead)


def test_an_error_is_known_before_its_turn(mesh):
    """Several processes ask ahead, so that all can stop at one step."""
    loader = make()
    good, calls = loader.next_batch, iter(range(100))
    loader.next_batch = lambda: good() if next(calls) < 5 else next(iter(()))
    with Prefetcher(loader, mesh, depth=8) as ahead:
        assert ahead.trouble(5) is None and isinstance(ahead.trouble(6), StopIteration)
        for _ in range(5):
            next(ahead)
        assert ahead.trouble(0) is None and isinstance(ahead.trouble(1), StopIteration)


def test_close_ends_the_thread_while_it_waits_for_room(mesh):
    ahead = Prefetcher(make(), mesh)
    ahead.close()
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "golf_jax-prefetch"]
    with pytest.raises(GolfError, match="closed"):
        next(ahead)


ONE_OF_TWO = """
import json, sys
import jax, numpy as np
from golf_jax.data.loader import StreamLoader
from golf_jax.data.prefetch import Prefetcher, local_rows
from golf_jax.mesh import make_mesh
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
mesh = make_mesh()
mine = local_rows(mesh, 16)
loader = StreamLoader([np.arange(5000, dtype=np.uint16)], ranks=8, rows=2, seq_len=16, row_slice=mine)
with Prefetcher(loader, mesh) as ahead:
    next(ahead)
    x, y, _ = next(ahead)
    whole = [{str(s.index): np.asarray(s.data).tolist() for s in a.addressable_shards} for a in (x, y)]
    print(json.dumps([x.shape, [mine.start, mine.stop], ahead.state()["batches"], whole]))
"""


def test_two_processes_place_their_halves_of_the_same_batch():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(Path(golf_jax.__file__).parents[1])}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    processes = [
        subprocess.Popen([sys.executable, "-c", ONE_OF_TWO, address, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    reports = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
    reference = make()
    reference.next_batch()
    batch = reference.next_batch()
    for number, (shape, rows, batches, halves) in enumerate(reports):
        assert (shape, rows, batches) == ([16, 16], [8 * number, 8 * number + 8], 2)
        for half, expected in zip(halves, batch[:2], strict=True):
            assert sorted(half.values()) == [expected[row : row + 2].tolist() for row in range(rows[0], rows[1], 2)]


def test_rows_of_this_process(mesh):
    assert local_rows(mesh, 16) == slice(0, 16)
    with pytest.raises(GolfError, match="12 sequences does not divide over 8"):
        local_rows(mesh, 12)
    with pytest.raises(GolfError, match="reads rows"):
        Prefetcher(make(row_slice=slice(0, 8)), mesh)

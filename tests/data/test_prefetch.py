"""Prefetching: right rows on right devices, exact position, errors of the thread, clean end."""

import threading

import numpy as np
import pytest
from jax.sharding import PartitionSpec

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
            for placed, rows in zip(next(ahead), reference.next_batch(), strict=True):
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


def test_close_ends_the_thread_while_it_waits_for_room(mesh):
    ahead = Prefetcher(make(), mesh)
    ahead.close()
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "golf_jax-prefetch"]
    with pytest.raises(GolfError, match="closed"):
        next(ahead)


def test_rows_of_this_process(mesh):
    assert local_rows(mesh, 16) == slice(0, 16)
    with pytest.raises(GolfError, match="12 sequences does not divide over 8"):
        local_rows(mesh, 12)
    with pytest.raises(GolfError, match="reads rows"):
        Prefetcher(make(row_slice=slice(0, 8)), mesh)

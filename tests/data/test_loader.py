"""Training orders: the records' own batches, resume, and a process's share of them."""

import json

import numpy as np
import pytest

from golf_jax.config import GolfError
from golf_jax.data.loader import DocumentLoader, ShuffledLoader, StreamLoader, make_loader
from golf_jax.data.shards import open_shard, write_shard


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 1024, size).astype(np.uint16) for size in (700, 1103, 501)]


def batches(loader, count):
    pairs = [loader.next_batch() for _ in range(count)]
    return np.stack([b.inputs for b in pairs]), np.stack([b.targets for b in pairs])


def equal(found, tokens):
    """Inputs and targets [steps, rows, T] are those of stored tokens [steps, ranks, rows, T + 1]."""
    for ours, want in zip(found, (tokens[..., :-1], tokens[..., 1:]), strict=True):
        np.testing.assert_array_equal(ours, want.reshape(ours.shape))


def test_stream_wraps_spans_shards_and_leaves_span_ends_as_targets_only(arrays):
    stream = np.concatenate(arrays * 3)
    x, y = batches(StreamLoader(arrays, ranks=4, rows=2, seq_len=16), 40)
    spans = stream[: 40 * 4 * 33].reshape(40, 4, 33)
    assert x.dtype == y.dtype == np.int32
    np.testing.assert_array_equal(x, spans[..., :-1].reshape(40, 8, 16))
    np.testing.assert_array_equal(y, spans[..., 1:].reshape(40, 8, 16))


@pytest.mark.parametrize(("pr", "section"), [(372, "train"), (638, "train"), (1182, "loader")])
def test_stream_equals_the_records(shared, pr, section):
    shards, want = np.load(shared / f"reference/pr{pr}/loader.npz"), np.load(shared / f"reference/pr{pr}/{section}.npz")["main/tokens"]
    steps, ranks, rows, length = want.shape
    loader = StreamLoader([shards[f"main/shard/{number}"] for number in range(3)], ranks=ranks, rows=rows, seq_len=length - 1)
    equal(batches(loader, steps), want)


def test_stream_equals_pr562(shared):
    want = np.load(shared / "reference/pr562/train.npz")["main/tokens"]
    tokens = open_shard(shared / "data/fineweb_sp1024/fineweb_train_000000.bin")[:120_000]
    equal(batches(StreamLoader([tokens[:30_001], tokens[30_001:]], ranks=8, rows=2, seq_len=128), len(want)), want)


def test_shuffled_equals_pr2005(shared):
    loader = make_loader("shuffled", shared / "data/fineweb_sp8192/fineweb_train_*.bin", ranks=1, rows=8, seq_len=128)
    x, y = batches(loader, 20)
    equal((x, y), np.load(shared / "reference/pr2005/train.npz")["main/tokens"])
    np.testing.assert_array_equal(x[:4], np.load(shared / "reference/pr2005/quant.npz")["main/calibration"])


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_shuffled_equals_pr2005_on_several_shards_ranks_and_passes(shared, ranks, rank):
    stored = np.load(shared / "reference/pr2005/loader.npz")
    # a token tells its shard and place, so that the batch tells what was drawn
    shards = [index * 8192 + np.arange(size) for index, size in enumerate(stored[f"ranks_{ranks}/shard_lengths"])]
    loader = ShuffledLoader(shards, ranks, rows=8, seq_len=128, row_slice=slice(8 * rank, 8 * rank + 8))
    x, y = batches(loader, 9)
    np.testing.assert_array_equal(np.stack(np.divmod(x[..., 0], 8192), -1), stored[f"ranks_{ranks}/drawn"][:, rank])
    np.testing.assert_array_equal(x, x[..., :1] + np.arange(128))
    np.testing.assert_array_equal(y, x + 1)


def test_shuffled_draws_as_numpys_weighted_choice(arrays):
    """The order of PR 2005 written down a second time, naively, with `Generator.choice` and over several passes."""
    seq_len, rng = 16, np.random.Generator(np.random.PCG64(1))
    shards, expected, orders = arrays[1::2] + arrays[:1], [], []
    while len(expected) < 400:
        if not sum(map(len, orders)):
            orders = []
            for shard in shards:
                phase = int(rng.integers(seq_len))
                orders.append((phase + rng.permutation((len(shard) - 1 - phase) // seq_len) * seq_len).tolist())
        left = np.array([len(order) for order in orders], float)
        chosen = int(rng.choice(len(shards), p=left / left.sum()))
        start = orders[chosen].pop()
        expected.append(shards[chosen][start : start + seq_len])
    interleaved = [arrays[2], shards[0], arrays[2], shards[1]]  # rank 1 of 2 owns the second and the fourth
    x, _ = batches(ShuffledLoader(interleaved, 2, rows=8, seq_len=seq_len, row_slice=slice(8, 16)), 50)
    np.testing.assert_array_equal(x.reshape(400, seq_len), expected)


@pytest.mark.parametrize("order", ["stream", "shuffled"])
@pytest.mark.parametrize("done", [0, 1, 7, 40])
def test_a_restored_loader_goes_on_as_if_never_stopped(arrays, order, done):
    whole, resumed = (make_loader(order, arrays, ranks=3, rows=2, seq_len=16) for _ in range(2))
    batches(whole, done) if done else None
    resumed.restore(json.loads(json.dumps(whole.state())))
    for before, after in zip(batches(whole, 30), batches(resumed, 30), strict=True):
        np.testing.assert_array_equal(before, after)
    assert whole.state() == resumed.state() and whole.state()["batches"] == done + 30


@pytest.mark.parametrize("order", ["stream", "shuffled"])
@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 8), slice(5, 6)])
def test_a_process_gets_its_rows_of_the_global_batch(arrays, order, rows):
    whole = make_loader(order, arrays, ranks=4, rows=2, seq_len=16)
    part = make_loader(order, arrays, ranks=4, rows=2, seq_len=16, row_slice=rows)
    part.restore(whole.state())
    for _ in range(3):
        for all_rows, some in zip(whole.next_batch()[:2], part.next_batch()[:2], strict=True):
            np.testing.assert_array_equal(all_rows[rows], some)
    assert whole.state() == part.state()


def test_ranks_share_shards_only_when_there_are_too_few(arrays):
    shared_shards = ShuffledLoader(arrays[:2], ranks=3, rows=1, seq_len=16)
    assert shared_shards.owned == {0: [0], 1: [1], 2: [0]}
    x, _ = batches(shared_shards, 20)
    assert (x[:, 0] != x[:, 2]).any()  # rank 2 reads shard 0 in an order of its own
    assert ShuffledLoader(arrays, ranks=2, rows=1, seq_len=16).owned == {0: [0, 2], 1: [1]}


def test_files_and_arrays_give_the_same_batches(arrays, tmp_path):
    for number, array in enumerate(arrays):
        write_shard(tmp_path / f"train_{number:06d}.bin", array)
    for order in ("stream", "shuffled"):
        from_files = make_loader(order, tmp_path / "train_*.bin", ranks=2, rows=2, seq_len=16)
        from_arrays = make_loader(order, arrays, ranks=2, rows=2, seq_len=16)
        np.testing.assert_array_equal(batches(from_files, 5), batches(from_arrays, 5))


def test_a_position_does_not_fit_other_data_or_another_shape(arrays):
    state = StreamLoader(arrays, ranks=2, rows=2, seq_len=16).state()
    with pytest.raises(GolfError, match="tokens was 2304"):
        StreamLoader(arrays[:2], ranks=2, rows=2, seq_len=16).restore(state)
    with pytest.raises(GolfError, match="ranks was 2"):
        StreamLoader(arrays, ranks=1, rows=2, seq_len=16).restore(state)


def test_mistakes_are_refused(arrays):
    with pytest.raises(GolfError, match="must be one of stream, shuffled"):
        make_loader("random", arrays, ranks=1, rows=1, seq_len=16)
    with pytest.raises(GolfError, match="no sequence of 2000"):
        ShuffledLoader(arrays, ranks=1, rows=1, seq_len=2000)
    with pytest.raises(GolfError, match="row_slice"):
        StreamLoader(arrays, ranks=1, rows=2, seq_len=16, row_slice=slice(2, 4))
    with pytest.raises(GolfError, match="outside a vocabulary of 512"):
        StreamLoader(arrays, ranks=1, rows=8, seq_len=64, vocab_size=512).next_batch()


@pytest.fixture
def packed():
    """Shards whose first document starts somewhere inside; BOS is 1."""
    rng = np.random.default_rng(1)
    shards = [rng.integers(2, 64, size).astype(np.uint16) for size in (700, 403, 1101)]
    for shard, every in zip(shards, (13, 90, 7), strict=True):
        shard[rng.integers(0, every) :: every] = 1
    return shards


def documents(shards, **changes):
    return make_loader("documents", shards, **({"ranks": 4, "rows": 3, "seq_len": 8} | changes))


def test_documents_are_packed_as_the_record_packs_them(shared):
    golden = np.load(shared / "reference/pr2135/loader.npz")
    shards = [golden[f"world1/shard/{number}"] for number in range(3)]
    for ranks in (1, 2, 4):
        tokens, segments = (golden[f"world{ranks}/{item}"][:, :, 0] for item in ("tokens", "segments"))
        loader = DocumentLoader(shards, ranks, 232, limit=48)
        read = [loader.next_batch() for _ in tokens]
        np.testing.assert_array_equal(np.stack([b.inputs for b in read]), tokens[..., :-1])
        np.testing.assert_array_equal(np.stack([b.targets for b in read]), tokens[..., 1:])
        np.testing.assert_array_equal(np.stack([b.segments for b in read]), segments)


def test_a_segment_is_one_document_and_no_longer_than_the_limit(packed):
    loader = documents(packed)
    for _ in range(40):
        batch = loader.next_batch()
        for row, segments in zip(batch.inputs, batch.segments, strict=True):
            begins = np.flatnonzero(np.diff(segments, prepend=-1))
            assert set(np.flatnonzero(row == 1)) <= set(begins)
            lengths = np.diff([*begins, len(row)])
            assert lengths.max() <= 8
            for begin, length in zip(begins[1:], lengths, strict=False):
                assert row[begin] == 1 or length == 8  # a document's start, or the cut behind a full segment


def test_packed_documents_resume_from_a_few_integers_and_wrap_around(packed):
    loader = documents(packed)
    expected = [loader.next_batch() for _ in range(30)]
    np.testing.assert_array_equal(expected[0].inputs[0, 0], 1)
    other = documents(packed)
    for _ in range(11):
        other.next_batch()
    state = json.loads(json.dumps(other.state()))
    fresh = documents(packed)
    fresh.restore(state)
    for batch in expected[11:]:
        for ours, theirs in zip(fresh.next_batch(), batch, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(GolfError, match="limit was 8"):
        documents(packed, rows=6, seq_len=4).restore(state)


def test_a_process_reads_its_own_packed_rows(packed):
    whole, part = documents(packed), documents(packed, row_slice=slice(1, 3))
    for _ in range(12):
        for ours, theirs in zip(part.next_batch(), whole.next_batch(), strict=True):
            np.testing.assert_array_equal(ours, theirs[1:3])


def test_no_shard_for_a_step_of_packed_rows(packed):
    with pytest.raises(GolfError, match="none holds as many"):
        documents(packed, rows=50).next_batch()
    with pytest.raises(GolfError, match="none holds as many"):
        documents([shard[shard != 1] for shard in packed]).next_batch()

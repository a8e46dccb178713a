"""The n-gram state read off sorts is that of a dictionary, collisions included; the tilted distribution is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golf_jax.evaluation.tilt import COEFFICIENTS, PAIR, hints, tilted


def by_dictionary(targets, order):
    """The record's state, one target after the other: context key -> [total, best count, best token], pair key -> count."""
    mask, contexts, pairs, found = (1 << 64) - 1, {}, {}, []
    for i, t in enumerate(targets):
        if i < order - 2:
            found.append((-1, 0.0))
            continue
        before = [int(targets[max(j, 0)]) for j in range(i - order + 1, i)]
        key = 0
        for token, c in zip(before, COEFFICIENTS, strict=False):
            key ^= token * int(c)
        pair = ((key * int(PAIR)) & mask) ^ (int(t) * int(COEFFICIENTS[order - 1]))
        state = contexts.get(key)
        found.append((state[2], np.float32(state[1]) / np.float32(state[0])) if state else (-1, 0.0))
        pairs[pair] = pairs.get(pair, 0) + 1
        if state is None:
            contexts[key] = [1, pairs[pair], int(t)]
        else:
            state[0] += 1
            if pairs[pair] > state[1]:
                state[1:] = pairs[pair], int(t)
    return found


def same(targets, order):
    ours, theirs = hints(np.array(targets), order), by_dictionary(targets, order)
    assert [(int(t), float(p)) for t, p in zip(ours.token, ours.prob, strict=True)] == [(t, float(p)) for t, p in theirs]
    return ours


@pytest.mark.parametrize("order", [2, 3, 5, 16])
@pytest.mark.parametrize("vocab", [2, 5, 300])
def test_it_is_a_dictionary(order, vocab):
    rng = np.random.default_rng(order)
    targets = rng.integers(0, vocab, 600)
    targets[300:420] = targets[40:160]
    found = same(targets, order)
    hinted = np.flatnonzero(found.token >= 0)
    assert len(hinted) > 50 and (found.source[hinted] < hinted).all() and (targets[found.source[hinted]] == found.token[hinted]).all()


def test_contexts_with_one_key_share_a_bucket():
    tokens = np.arange(4096)
    keys = (tokens.astype(np.uint64)[:, None] * COEFFICIENTS[0]) ^ (tokens[:512].astype(np.uint64) * COEFFICIENTS[1])
    order = np.argsort(keys, axis=None)
    flat = keys.reshape(-1)[order]
    twins = order[np.flatnonzero(flat[1:] == flat[:-1])[0] + np.arange(2)]
    (a, b), (c, d) = (divmod(int(x), 512) for x in twins)
    assert (a, b) != (c, d)
    found = same([9, a, b, 77, 9, c, d, 5, 9], 3)
    assert found.token[7] == 77  # what followed the other context


def test_short_sequences_have_no_hints():
    for n in range(5):
        assert (hints(np.zeros(n, int), 6).token == -1).all()


@pytest.mark.parametrize("boost", [0.5, 2.625, 20.0])
def test_the_tilted_distribution_sums_to_one(boost):
    logp = jax.nn.log_softmax(5 * jax.random.normal(jax.random.key(0), (6, 50)))
    hint = jnp.arange(6)[:, None] * 9 - 9  # the first: none
    nll = tilted(-logp, jnp.take_along_axis(logp, jnp.maximum(hint, 0), 1), hint, jnp.arange(50)[None], boost)
    np.testing.assert_allclose(np.exp(-np.asarray(nll, np.float64)).sum(1), 1, atol=2e-6)
    assert np.array_equal(nll[0], -logp[0]) and (nll[2, 9] < -logp[2, 9]) and (nll[2, 10] > -logp[2, 10])

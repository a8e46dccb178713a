"""The fused head and cross entropy against plain autodiff, and the memory it exists for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golf_jax.kernels.cross_entropy import softcap_cross_entropy, softcap_cross_entropy_reference, softcap_logits

N, V, D, SOFTCAP = 50, 96, 16, 5.0


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    x = 2 * jax.random.normal(keys[0], (N, D))
    table = jax.random.normal(keys[1], (V, D))
    return x, table, jax.random.randint(keys[2], (N,), 0, V), jax.random.uniform(keys[3], (N,))


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def value_and_gradients(function, x, table, targets, weights):
    def total(x, table):
        nll = function(x, table, targets, softcap=SOFTCAP)
        return jnp.sum(nll * weights), nll

    (_, nll), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, table)
    return nll, *gradients


@pytest.mark.parametrize("chunk", [None, 10, 16], ids=["whole", "even pieces", "padded pieces"])
def test_matches_autodiff_in_float32(case, chunk):
    x, table, targets, weights = case
    expected = value_and_gradients(softcap_cross_entropy_reference, *case)
    got = value_and_gradients(lambda *a, **k: softcap_cross_entropy(*a, **k, chunk=chunk), *case)
    for name, a, b in zip(("nll", "dx", "dtable"), got, expected, strict=True):
        assert relative(a, b) < 2e-6, name


@pytest.mark.parametrize("chunk", [None, 10])
def test_bfloat16_with_float32_table(case, chunk):
    x, table, targets, weights = case
    x = x.astype(jnp.bfloat16)
    table = table.astype(jnp.bfloat16).astype(jnp.float32)
    expected = value_and_gradients(softcap_cross_entropy_reference, x.astype(jnp.float32), table, targets, weights)
    nll, dx, dtable = value_and_gradients(lambda *a, **k: softcap_cross_entropy(*a, **k, chunk=chunk), x, table, *case[2:])
    assert (nll.dtype, dx.dtype, dtable.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert relative(nll, expected[0]) < 2e-6  # bf16 products are exact in fp32: the values do not pay for bf16
    assert relative(dx, expected[1]) < 6e-3 and relative(dtable, expected[2]) < 6e-3


@pytest.mark.parametrize("chunk", [None, 16], ids=["whole", "padded pieces"])
def test_a_softcap_for_either_sign_matches_autodiff(case, chunk):
    x, table, targets, weights = case

    def run(function):
        def total(x, table, sides):
            nll = function(x, table, targets, softcap=sides)
            return jnp.sum(nll * weights), nll

        sides = jnp.float32(3.0), jnp.float32(7.0)
        (_, nll), (dx, dtable, dsides) = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(x, table, sides)
        return nll, dx, dtable, *dsides

    expected = run(softcap_cross_entropy_reference)
    got = run(lambda *a, **k: softcap_cross_entropy(*a, **k, chunk=chunk))
    for name, a, b in zip(("nll", "dx", "dtable", "dpositive", "dnegative"), got, expected, strict=True):
        assert relative(a, b) < 2e-6, name
    capped = softcap_logits(10 * x, table, softcap=(jnp.float32(3.0), jnp.float32(7.0)))
    assert float(capped.max()) == 3.0 and float(capped.min()) == -7.0


def test_large_logits_saturate_at_the_softcap():
    x, table = jnp.full((1, 1), 1e4), jnp.array([[1.0], [-1.0]])
    nll = softcap_cross_entropy(x, table, jnp.array([1]), softcap=30.0)
    np.testing.assert_allclose(nll, [60.0], rtol=1e-6)
    assert float(softcap_logits(x, table, softcap=30.0)[0, 0]) == 30.0


def temporary_bytes(function, tokens, vocab, dim):
    x = jax.ShapeDtypeStruct((tokens, dim), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((vocab, dim), jnp.float32)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    loss = lambda x, t, y: jnp.mean(function(x, t, y, softcap=30.0))  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1))).lower(x, table, targets).compile().memory_analysis().temp_size_in_bytes


def test_default_pieces_keep_large_heads_out_of_memory():
    tokens, vocab, dim = 98304, 8192, 8  # one GPU's share of a PR 2005 step; compiled, not run
    assert temporary_bytes(softcap_cross_entropy, tokens, vocab, dim) < 1.5e9
    assert temporary_bytes(softcap_cross_entropy_reference, tokens, vocab, dim) > 6e9


@pytest.mark.parametrize("bad", [dict(softcap=0.0), dict(softcap=100.0), dict(softcap=30.0, chunk=0)])
def test_bad_arguments(case, bad):
    with pytest.raises(ValueError, match="softcap must|chunk must"):
        softcap_cross_entropy(*case[:3], **bad)

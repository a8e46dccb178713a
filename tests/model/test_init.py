"""Fresh parameters: orthogonal or uniform, zero outputs, one rounding to bfloat16; the records' own statistics are in test_reproduce."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golf_jax.config import GolfError, ModelConfig
from golf_jax.model import init_params, leaves, logits
from golf_jax.model.params import from_tensors, storage_dtypes, to_tensors

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = ModelConfig(vocab_size=40, num_layers=2, width=64, num_heads=2, num_kv_heads=1, bigram_buckets=32, bigram_dim=64 + 2)


def test_large_matrices_are_orthogonal_small_ones_uniform():
    params = init_params(CONFIG, jax.random.key(0))
    for name, gain in (("q", 1.0), ("up", 1.0), ("bigram_proj", 0.5)):  # 1 / sqrt(2 * 2 layers)
        w = np.asarray(params[name], np.float64).reshape(-1, *params[name].shape[-2:])[0]
        np.testing.assert_allclose(np.linalg.svd(w, compute_uv=False), gain, rtol=1e-5)
    k = np.asarray(params["k"])  # 64 x 32: below the limit of 64
    assert np.abs(k).max() <= 1 / 8 and np.isclose(k.std(), 1 / 8 / np.sqrt(3), rtol=0.05)
    assert not np.any(params["o"]) and not np.any(params["down"]) and not np.any(params["bigram_table"])


def test_the_naive_baseline_starts_uniform():
    q = np.asarray(init_params(replace(CONFIG, linear_init="uniform"), jax.random.key(0))["q"])
    assert np.abs(q).max() <= 1 / 8 and np.isclose(q.std(), 1 / 8 / np.sqrt(3), rtol=0.05)


def test_as_run_rounds_once_and_keeps_the_tables_low():
    config = replace(CONFIG, bf16_params=("tok_emb", "bigram_table"))
    params = init_params(config, jax.random.key(0), "as_run")
    low = {n for n, p in params.items() if p.dtype == jnp.bfloat16}
    assert low == {"tok_emb", "bigram_table"} == {n for n, d in storage_dtypes(config, "as_run").items() if d == jnp.bfloat16}
    assert float(params["bigram_scale"]) == 0.050048828125
    for p in params.values():
        np.testing.assert_array_equal(p, p.astype(jnp.bfloat16).astype(p.dtype))
    exact = init_params(config, jax.random.key(0), "fp32")
    assert all(p.dtype == jnp.float32 for p in exact.values())


def test_the_first_loss_is_that_of_a_uniform_guess():
    params = init_params(CONFIG, jax.random.key(0))
    out = np.asarray(jax.jit(lambda p, x: logits(CONFIG, p, x))(params, np.arange(20).reshape(2, 10)))
    assert np.abs(np.log(np.exp(out).sum(-1)) - np.log(40)).max() < 0.05


def test_matrices_are_factorized_one_at_a_time():
    """A batch of factorizations blocks the threads it needs (jax 0.10 on a CPU): several stacks at once wait forever."""
    text = jax.jit(lambda key: init_params(CONFIG, key)).lower(jax.random.key(0)).as_text()
    calls = [line for line in text.splitlines() if "geqrf" in line]
    assert calls and not any(re.search(r"tensor<\d+x\d+x\d+x", line) for line in calls)


def test_seeds_differ_and_repeat():
    a, b, c = (init_params(CONFIG, jax.random.key(s)) for s in (0, 0, 1))
    assert np.array_equal(a["q"], b["q"]) and not np.array_equal(a["q"], c["q"])


def test_every_leaf_has_a_role_and_a_name():
    table = leaves(CONFIG)
    assert len({leaf.tensor for leaf in table.values()}) == len(table)
    assert {leaf.role for leaf in table.values()} <= {"matrix", "gate", "proj", "token", "table", "trigram", "vector"}


def test_tensors_that_do_not_fit_are_named():
    tensors = to_tensors(CONFIG, init_params(CONFIG, jax.random.key(0)))
    with pytest.raises(GolfError, match="missing tok_emb.weight; unknown tok.weight"):
        from_tensors(CONFIG, {("tok.weight" if n == "tok_emb.weight" else n): t for n, t in tensors.items()})
    with pytest.raises(GolfError, match=r"blocks.1.attn.q_gain has shape \(3,\).*needs \(2,\)"):
        from_tensors(CONFIG, tensors | {"blocks.1.attn.q_gain": np.ones(3)})


def test_tokens_must_be_rows():
    with pytest.raises(GolfError, match="batch, time"):
        logits(CONFIG, init_params(CONFIG, jax.random.key(0)), np.arange(4))

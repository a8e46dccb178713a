"""The Linen module is the network, and what it is called with is checked."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from tiny_recipes import tiny

from golf_jax.config import GolfError, ModelConfig
from golf_jax.kernels.attention import xsa_attention
from golf_jax.kernels.mlp import mosaic_gpu
from golf_jax.kernels.native import library
from golf_jax.model import GPT, gpt, init_params, logits, nll, platforms, weights
from golf_jax.model import layers as ops

CONFIG = ModelConfig(vocab_size=40, num_layers=2, width=32, num_heads=2, num_kv_heads=1)
TOKENS = np.arange(20).reshape(2, 10)
KEY = jax.random.key(0)
PARAMS = init_params(CONFIG, KEY)
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="the GPU interpreter of Pallas works from jax 0.11 (Python 3.12) on"
)


def test_init_and_apply_are_the_functions():
    variables = GPT(CONFIG).init(jax.random.key(0), TOKENS)
    assert variables["params"].keys() == PARAMS.keys()
    assert all(np.array_equal(variables["params"][name], PARAMS[name]) for name in PARAMS)
    np.testing.assert_array_equal(GPT(CONFIG).apply(variables, TOKENS), logits(CONFIG, PARAMS, TOKENS))


def test_fine_tuning_with_optax():
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: nll(CONFIG, p, TOKENS[:, :-1], TOKENS[:, 1:]).mean())(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = PARAMS, optimizer.init(PARAMS), []
    for _ in range(10):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5


def test_numpy_parameters_work_under_jit():
    host = {name: np.asarray(x) for name, x in PARAMS.items()}
    out = jax.jit(lambda x: logits(CONFIG, host, x))(TOKENS)
    np.testing.assert_allclose(out, jax.jit(lambda p, x: logits(CONFIG, p, x))(PARAMS, TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[0], r"\[batch, time\], got shape \(10,\); add the batch axis"),
        (TOKENS.astype(np.float32), "must be integers, got float32"),
        (TOKENS + 30, "token 49 is outside the vocabulary of 40"),
        (TOKENS - 1, "token -1 is outside"),
    ],
)
def test_tokens_that_cannot_be(tokens, message):
    with pytest.raises(GolfError, match=message):
        logits(CONFIG, PARAMS, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "leaf 'q' is missing"),
        ({"q_gian": jnp.ones(2)}, "unknown leaf 'q_gian'; did you mean 'q_gain'"),
        ({"q_gain": jnp.ones(2)}, r"leaf 'q_gain' has shape \(2,\), the model configuration needs \(2, 2\)"),
    ],
)
def test_leaves_that_cannot_be(change, message):
    params = {name: x for name, x in (PARAMS | change).items() if x is not None}
    with pytest.raises(GolfError, match=message):
        GPT(CONFIG).apply({"params": params}, TOKENS)


def test_constant_tokens_may_be_closed_over():
    """Inside a trace: their values are known, the operations on them are not."""
    params = init_params(CONFIG, jax.random.key(0))
    closed = jax.jit(lambda p: logits(CONFIG, p, TOKENS))(params)
    np.testing.assert_array_equal(closed, jax.jit(lambda p, x: logits(CONFIG, p, x))(params, TOKENS))


@pytest.mark.parametrize("kind, inside", [("linear", True), ("query_rows", False)])
def test_a_gate_acts_once_inside_the_kernels_or_behind_them(kind, inside, monkeypatch):
    """The kernels are stood in for by the reference; with and without `pallas` the logits are the same."""
    config = replace(CONFIG, head_gate=kind)
    params = init_params(config, jax.random.key(0))
    params |= {n: jax.random.normal(jax.random.key(i), x.shape) for i, (n, x) in enumerate(params.items()) if "gate" in n}
    expected, given = logits(config, params, TOKENS), []

    def kernels(q, k, v, *, xsa, first_BS, longest, backend, gate_BSH=None):
        given.append(gate_BSH is not None)
        y = xsa_attention(q, k, v, xsa=xsa, first_BS=first_BS, longest=longest)
        return y if gate_BSH is None else y * jax.nn.sigmoid(gate_BSH)[..., None]

    monkeypatch.setattr(gpt, "xsa_attention", kernels)
    monkeypatch.setattr(platforms, "supported_backends", lambda *a, **k: ("xla", "pallas"))
    np.testing.assert_allclose(logits(replace(config, attention="pallas"), params, TOKENS), expected, atol=1e-5)
    assert given == [inside] * config.num_layers


@pytest.mark.parametrize("last", [None, 4])
@pytest.mark.parametrize("name", ["pr372", "pr562", "pr638", "pr2005", "pr2135"])
def test_late_norms_and_factors_change_nothing(name, last, monkeypatch):
    """What kernels with factors are called with, here the reference: norms behind the maps, output scales in them, gain and the gradients
    of the norms' factors inside attention, the activation inside the MLP's second map. last: of the last block only some queries,
    which the reference backend computes."""
    config = tiny(name).model
    params = {n: x + 0.2 * jax.random.normal(jax.random.key(i), x.shape) for i, (n, x) in enumerate(init_params(config, KEY).items())}
    given, activated = [], []

    def mlp_kernels(u, r, w, slope):
        activated.append(u.shape)
        return ops.linear(ops.squared_leaky(u * r[:, None], slope), w)

    def kernels(q, k, v, *, xsa, first_BS, longest, backend, gate_BSH=None, factors=None):
        given.append(factors is not None)
        if factors is not None:
            gain, *logs = factors
            one_q, one_k, one_v = (jnp.exp(log - jax.lax.stop_gradient(log))[..., None] for log in logs)
            q, k, v = q * gain[:, None] * one_q, k * one_k, v * one_v
        y = xsa_attention(q, k, v, xsa=xsa, first_BS=first_BS, longest=longest)
        return y if gate_BSH is None else y * jax.nn.sigmoid(gate_BSH)[..., None]

    expected = loss_and_gradients(replace(config, attention="xla"), params, last)
    monkeypatch.setattr(gpt, "xsa_attention", kernels)
    for module in (gpt, weights):
        monkeypatch.setattr(module, "has_factors", lambda backend: backend == "pallas")
    monkeypatch.setattr(gpt, "squared_leaky_linear", mlp_kernels)
    assert_same(loss_and_gradients(replace(config, attention="pallas", mlp="pallas"), params, last), expected)
    assert all(given[:-1]) and given[-1] == (last is None) and len(activated) == len(given)


@pytest.mark.skipif(not library.compiler(), reason="no C++ compiler on this machine")
@pytest.mark.parametrize("last", [None, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["pr372", "pr562", "pr638", "pr1182", "pr2005", "pr2135"])
def test_native_attention_changes_nothing(name, last):
    """With the same late norms and factors, which it has for suffixes, too."""
    config = replace(tiny(name).model, num_heads=2, num_kv_heads=1)  # head_dim 16
    params = {n: x + 0.2 * jax.random.normal(jax.random.key(i), x.shape) for i, (n, x) in enumerate(init_params(config, KEY).items())}
    got, expected = (loss_and_gradients(replace(config, attention=backend), params, last) for backend in ("native", "xla"))
    assert_same(got, expected)


def loss_and_gradients(config, params, last):
    targets = TOKENS[:, ::-1] if last is None else TOKENS[:, :last]
    return jax.value_and_grad(lambda p: jnp.mean(nll(config, p, TOKENS, targets, training=True, last=last)))(params)


def assert_same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max()), rtol=1e-4), got, expected)


@needs_interpreter
@pytest.mark.parametrize("name", [pytest.param("pr638", marks=pytest.mark.slow), "pr2005"])
def test_a_recipe_with_the_kernels_of_its_mlp(name, monkeypatch):
    """Attention stood in for by the reference. In bfloat16 loss and gradients are others than without the kernels, and as near to
    those of float32."""
    config = replace(tiny(name).model, width=128, mlp_ratio=2.0, num_layers=2, parallel_from=-1, loop_start=-1, loop_end=-1, loop_repeats=0)
    params = {n: x + 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, (n, x) in enumerate(init_params(config, KEY).items())}

    def kernels(q, k, v, *, xsa, first_BS, longest, backend, gate_BSH=None, factors=None):
        gain, *logs = factors
        q, k, v = (x * jnp.exp(log - jax.lax.stop_gradient(log))[..., None].astype(x.dtype) for x, log in zip((q, k, v), logs, strict=True))
        y = xsa_attention(q * gain[:, None].astype(q.dtype), k, v, xsa=xsa)
        return y if gate_BSH is None else y * jax.nn.sigmoid(gate_BSH)[..., None]

    def loss_and_gradients(dtype, mlp):
        run = replace(config, dtype=dtype, attention="pallas", mlp=mlp)
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(nll(run, p, TOKENS, TOKENS[:, ::-1], training=True))))(params)

    monkeypatch.setattr(gpt, "xsa_attention", kernels)
    for module in (gpt, weights):
        monkeypatch.setattr(module, "has_factors", lambda backend: backend == "pallas")
    monkeypatch.setattr(gpt, "squared_leaky_linear", partial(mosaic_gpu.squared_leaky_linear, interpret=True))
    exact = loss_and_gradients("float32", "xla")

    def error(got):
        """Relative, of loss and gradients, taken together: rounding is a few percent of the smallest."""
        each = jax.tree.map(lambda a, b: np.linalg.norm(np.asarray(a - b)) / np.linalg.norm(np.asarray(b)), got, exact)
        return float(np.linalg.norm(jax.tree.leaves(each)))

    plain, got = (error(loss_and_gradients("bfloat16", mlp)) for mlp in ("xla", "pallas"))
    assert got != plain and got < 1.3 * plain


def test_the_parts_have_names_in_a_profile():
    params = init_params(CONFIG, jax.random.key(0))
    text = jax.jit(lambda p: nll(CONFIG, p, TOKENS, TOKENS)).lower(params).as_text(debug_info=True)
    assert all(f"/{name}/" in text for name in ("embed", "attention", "mlp", "head"))

"""Decoding with kept keys and values is the forward pass of the whole row, for the parts of every shipped recipe."""

from dataclasses import replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_recipes import SHIPPED, tiny

from golf_jax.config import GolfError
from golf_jax.model import leaves, logits, resolve
from golf_jax.model.cache import empty
from golf_jax.model.decode import CHUNK, Decoder, Sampling, extend, sample
from golf_jax.model.model import Model


def noisy(config):
    """Nothing starts at zero, so that every part counts."""
    params = {}
    for name, leaf in leaves(config).items():
        noise = 0.3 * np.random.default_rng(sum(map(ord, name))).standard_normal(leaf.shape)
        params[name] = (noise + {"vector": 1.0, "softcap": 30.0}.get(leaf.role, 0.0)).astype(np.float32)
    return params


BROAD = ("pr1182", "pr2135")  # between them: hashes, smear, XSA, both value techniques; recurrence, lanes, gates, boundaries
CASES = [pytest.param(name, marks=() if name in BROAD else pytest.mark.slow) for name in (*SHIPPED, "pr2135")]
PR2135 = dict(xsa_last_n=4, head_gate="narrow", gate_window=8, input_smear_gate=True, boundary_token=1, asym_softcap=True)
PR2135 |= dict(parallel_from=-1, two_lanes_from=3)


@pytest.mark.parametrize("name", CASES)
def test_pieces_and_single_tokens_are_the_row(name):
    """A row longer than the training length of RoPE's rescaling, in pieces of 4, then token by token."""
    config = resolve(replace(tiny("pr2005").model, **PR2135) if name == "pr2135" else replace(tiny(name).model, xsa_last_n=2), "cpu")
    params, row = noisy(config), np.random.default_rng(0).integers(0, config.vocab_size, (2, 20))
    whole = jax.jit(lambda p, x: logits(config, p, x))(params, row)
    program = jax.jit(lambda p, s, x, at, n: extend(config, p, s, x, at, n), static_argnums=4)
    store, pieces, at = empty(config, 2, 20, looping=True), [], 0
    for count in (4, 4, *[1] * 12):
        unknown = np.where(np.arange(20) < at + count, row, 0)
        z, store = program(params, store, unknown, jnp.int32(at), count)
        pieces.append(z)
        at += count
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=2e-5)


@pytest.fixture(scope="module")
def model():
    config = replace(tiny("pr372").model, num_layers=2)
    return Model.open(config, noisy(config), "cpu")


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, CHUNK + 4)


@pytest.mark.parametrize("length", [1, 3, CHUNK + 1, CHUNK + 3])
def test_the_likeliest_token_is_that_of_the_whole_row(model, decoder, length):
    prompt = np.random.default_rng(length).integers(0, 64, length).tolist()
    stream = decoder.stream(prompt, Sampling(temperature=0.0))
    tokens = prompt + [next(stream) for _ in range(min(6, CHUNK + 4 - length))]
    row = np.zeros((1, CHUNK + 4), int)
    row[0, : len(tokens)] = tokens
    best = np.argmax(jax.jit(lambda p, x: logits(model.config, p, x))(model.params, row)[0], -1)
    assert tokens[length:] == best[length - 1 : len(tokens) - 1].tolist()


def test_a_full_row_goes_on_from_its_second_half(decoder):
    full = CHUNK + 4
    prompt = np.random.default_rng(0).integers(0, 64, full - 1).tolist()
    stream = decoder.stream(prompt, Sampling(temperature=0.0))
    tokens = prompt + [next(stream) for _ in range(5)]
    again = decoder.stream(tokens[full // 2 : full], Sampling(temperature=0.0))
    assert tokens[full:] == [next(again) for _ in range(4)]


def test_the_seed_is_the_text(decoder):
    def text(seed):
        return list(islice(decoder.stream([1, 2], Sampling(1.0, seed=seed)), 20))

    assert text(3) == text(3) != text(4)


def test_sampling_keeps_what_it_says():
    p = np.array([0.05, 0.5, 0.15, 0.3])
    z = jnp.tile(jnp.log(p), (4000, 1))

    def shares(temperature=1.0, top_k=4, top_p=1.0):
        drawn = sample(jax.random.key(0), z, jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(), p, atol=0.03)
    np.testing.assert_allclose(shares(temperature=0.5), p**2 / sum(p**2), atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.7), [0, 0.625, 0, 0.375], atol=0.03)  # 0.5 does not reach it, 0.8 does
    assert shares(temperature=0.0).tolist() == shares(top_k=1).tolist() == [0, 1, 0, 0]


def test_what_cannot_be_drawn_is_refused(decoder):
    for wrong, word in ((dict(temperature=-1.0), "temperature"), (dict(top_k=-1), "top-k"), (dict(top_p=0.0), "top-p")):
        with pytest.raises(GolfError, match=word):
            Sampling(**wrong)
    for prompt, word in (([], "empty"), ([64], "outside the vocabulary")):
        with pytest.raises(GolfError, match=word):
            next(decoder.stream(prompt, Sampling()))

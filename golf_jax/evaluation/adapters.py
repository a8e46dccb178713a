"""Low-rank adapters, one set per document side by side (PR 2135; docs/recipes/pr2135_quant_eval.md, section 5.3 to 5.5).

Leaves: `TARGET.a` [B, S, rank, in] and `TARGET.b` [B, S, out, rank] of q, v, o and mlp for the S executed layers, `head.a` and `head.b`
without S. Axis letters as in the model; B are documents.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from golf_jax.config import DocumentsConfig, ModelConfig
from golf_jax.evaluation.tilt import tilted
from golf_jax.kernels.cross_entropy import soft_cap
from golf_jax.model import head_softcap, hidden

Leaves = dict[str, jax.Array]
Params = dict[str, jax.Array]


class Adapters(NamedTuple):
    """What a step changes; donated to every call and never leaves the devices."""

    leaves: Any
    second: Any
    """AdamW's second moments."""
    step: Any
    """Steps since the last reset, int32."""


class Chunk(NamedTuple):
    """One chunk of every document of a batch."""

    tokens: Any
    """Window inputs, uint16 [B, W]; 0 behind the end."""
    targets: Any
    """Scored targets, uint16 [B, C]."""
    first: Any
    """Window position of the first scored target, int32 [B]."""
    hint: Any
    """Hinted token, int32 [B, C]; -1: none."""
    goes_on: Any
    """1 for documents with a later chunk, float32 [B]: these are trained on."""


def leaf_shapes(config: ModelConfig, looping: bool, batch: int, rank: int) -> dict[str, tuple[int, ...]]:
    steps, d = sum(map(len, config.layer_order(looping))), config.width
    outputs = {"q": d, "v": config.num_kv_heads * config.head_dim, "o": d, "mlp": d}
    shapes = {f"{t}.a": (batch, steps, rank, d) for t in outputs} | {f"{t}.b": (batch, steps, o, rank) for t, o in outputs.items()}
    return shapes | {"head.a": (batch, rank, d), "head.b": (batch, config.vocab_size, rank)}


def fresh(config: ModelConfig, looping: bool, batch: int, rank: int, key: jax.Array) -> Adapters:
    """A uniform in +-1/sqrt(D), B and moments zero, float32."""
    shapes = leaf_shapes(config, looping, batch, rank)
    keys, bound = jax.random.split(key, len(shapes)), 1 / math.sqrt(config.width)
    leaves = {
        n: jax.random.uniform(k, s, jnp.float32, -bound, bound) if n.endswith(".a") else jnp.zeros(s)
        for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }
    return Adapters(leaves, {n: jnp.zeros(s) for n, s in shapes.items()}, jnp.int32(0))


def reset(adapters: Adapters) -> Adapters:
    """For the next documents: B and moments zero, A as it is."""
    leaves = {n: x if n.endswith(".a") else jnp.zeros_like(x) for n, x in adapters.leaves.items()}
    return Adapters(leaves, jax.tree.map(jnp.zeros_like, adapters.second), jnp.zeros_like(adapters.step))


def _low_rank(x_BTD: jax.Array, a_BRD: jax.Array, b_BOR: jax.Array) -> jax.Array:
    z_BTR = jnp.einsum("btd,brd->btr", x_BTD, a_BRD.astype(x_BTD.dtype))
    return jnp.einsum("btr,bor->bto", z_BTR, b_BOR.astype(x_BTD.dtype))


def chunk_loss(
    config: ModelConfig, looping: bool, ttt: DocumentsConfig, params: Params, leaves: Leaves, chunk: Chunk
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(training loss, (nll, tilted nll)), float32 [B, C], of one forward pass of the window.

    The loss is the sum, over documents that go on, of the mean untilted nll of their chunk.
    """
    scale = ttt.alpha / ttt.rank

    def branch(where: str, z_BTD: jax.Array, y_BTO: jax.Array) -> jax.Array:
        step, target = where.split("/")
        a, b = leaves[f"{target}.a"][:, int(step)], leaves[f"{target}.b"][:, int(step)]
        return y_BTO + jnp.asarray(scale, y_BTO.dtype) * _low_rank(z_BTD, a, b)

    x_BTD = hidden(config, params, chunk.tokens.astype(jnp.int32), looping=looping, branch=branch)
    place_BC = jnp.minimum(chunk.first[:, None] + jnp.arange(chunk.targets.shape[1]), x_BTD.shape[1] - 1)
    f_BCD = jnp.take_along_axis(x_BTD, place_BC[..., None], axis=1)
    raw_BCV = jnp.einsum("bcd,vd->bcv", f_BCD, params["tok_emb"].astype(f_BCD.dtype), preferred_element_type=jnp.float32)
    raw_BCV = raw_BCV + scale * _low_rank(f_BCD, leaves["head.a"], leaves["head.b"]).astype(jnp.float32)
    logp_BCV = jax.nn.log_softmax(soft_cap(raw_BCV, head_softcap(config, params)))
    pick = lambda token_BC: jnp.take_along_axis(logp_BCV, token_BC[..., None], axis=-1)[..., 0]  # noqa: E731
    target_BC = chunk.targets.astype(jnp.int32)
    nll_BC = -pick(target_BC)
    scored_BC = tilted(nll_BC, pick(jnp.maximum(chunk.hint, 0)), chunk.hint, target_BC, ttt.tilt.boost)
    return jnp.sum(jnp.mean(nll_BC, axis=1) * chunk.goes_on), (nll_BC, scored_BC)


def adamw(ttt: DocumentsConfig, p: jax.Array, g: jax.Array, v: jax.Array, step: jax.Array, lr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(parameter, second moment) after AdamW without momentum, eps outside the root; step counts from 1."""
    v = ttt.beta2 * v + (1 - ttt.beta2) * jnp.square(g)
    debiased = v / (1 - ttt.beta2 ** step.astype(jnp.float32))
    return p * (1 - lr * ttt.weight_decay) - lr * g / (jnp.sqrt(debiased) + ttt.eps), v


def score_then_step(
    config: ModelConfig, looping: bool, ttt: DocumentsConfig, params: Params, adapters: Adapters, chunk: Chunk, lr: jax.Array
) -> tuple[Adapters, jax.Array]:
    """(adapters after one step on the chunk, its scores [B, C] before that step). lr 0: the adapters stay."""
    loss = functools.partial(chunk_loss, config, looping, ttt, params)
    grads, (_, scored_BC) = jax.grad(loss, has_aux=True)(adapters.leaves, chunk)
    step = adapters.step + 1
    moved = {n: adamw(ttt, p, grads[n], adapters.second[n], step, lr) for n, p in adapters.leaves.items()}
    return Adapters({n: p for n, (p, _) in moved.items()}, {n: v for n, (_, v) in moved.items()}, step), scored_BC

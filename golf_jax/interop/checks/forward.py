"""Forward passes and gradients: logits, losses, activations, hash buckets; d loss / d every parameter."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import ModelConfig
from golf_jax.interop.checks.base import compiler_options
from golf_jax.interop.checks.reference import Case, NotComputed
from golf_jax.kernels.attention import xsa_attention
from golf_jax.model import layers as ops
from golf_jax.model import logits, to_tensors
from golf_jax.model.fake_quant import fake_quantize
from golf_jax.model.gpt import nll


def _text(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, int32 [B, T]."""
    if "segments" in case.seen:
        raise NotComputed("attention that stays inside documents (segments) is not implemented")
    if "tokens" not in case.seen:
        raise NotComputed("has no tokens")
    tokens = case.seen["tokens"].astype(np.int32)
    return tokens[..., :-1], tokens[..., 1:]


def check_model(case: Case) -> None:
    x, y = _text(case)
    config, looping = case.model, case.looping

    def forward(params: dict, x_BT: jax.Array, y_BT: jax.Array):
        taps: dict[str, jax.Array] = {}
        out = logits(config, params, x_BT, looping=looping, tap=taps.__setitem__)
        return out, nll(config, params, x_BT, y_BT, looping=looping), taps

    key = ("forward", config, x.shape, looping)
    compiled = case.refs.once(key, lambda: jax.jit(forward, compiler_options=compiler_options()))
    out, losses, taps = jax.tree.map(np.asarray, compiled(case.params, x, y))
    wide = out.astype(np.float64)
    ours = {"logits": out, "nll": losses, "loss": losses.mean(dtype=np.float64), "logsumexp": np.log(np.exp(wide).sum(-1))}
    encoder, decoder = config.layer_order(looping)
    ours["layer_order"] = np.array(encoder + decoder)
    ours |= {f"acts/{name}": x for name, x in activations(taps).items()} | hash_ids(config, x)
    case.compare(ours)


def activations(taps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Taps by the format's names: without the layer, and with plain attention beside XSA's."""
    named = {"/".join(name.split("/")[:1] + name.split("/")[2:]) if name.count("/") == 2 else name: x for name, x in taps.items()}
    for step in [name.split("/")[0] for name in named if name.endswith("/q")]:
        q, k, v = (jnp.asarray(named[f"{step}/{part}"]) for part in "qkv")
        named[f"{step}/sdpa"] = np.asarray(xsa_attention(q, k, v, xsa=False))
    return named


def hash_ids(config: ModelConfig, tokens: np.ndarray) -> dict[str, Any]:
    found, ids = {}, jnp.asarray(tokens, jnp.int32)
    if config.bigram_buckets:
        found["ids/bigram"] = ops.bigram_ids(ids, config.bigram_buckets)
    if config.trigram != "off":
        table = config.trigram == "table"
        buckets = config.trigram_buckets if table else config.bigram_buckets
        found["ids/trigram"] = ops.trigram_ids(ids, buckets, bigram_at_1=table)
    return found


def check_grads(case: Case) -> None:
    x, y = _text(case)
    quantized, looping = bool(case.settings.get("fake_quant")), case.looping
    plain = replace(case.model, fake_quant=replace(case.model.fake_quant, in_eval=False))

    def mean_loss(params: dict, x_BT: jax.Array, y_BT: jax.Array) -> jax.Array:
        return jnp.mean(nll(plain, params, x_BT, y_BT, looping=looping, fake_quant=1.0 if quantized else None))

    compiled = jax.jit(jax.value_and_grad(mean_loss), compiler_options=compiler_options())
    loss, grads = compiled({k: jnp.asarray(v) for k, v in case.params.items()}, x, y)
    named = to_tensors(plain, grads)
    norms = {name: np.linalg.norm(g.astype(np.float64)) for name, g in named.items()}
    ours: dict[str, Any] = {"loss": loss, "grad_norm": np.sqrt(sum(n**2 for n in norms.values()))}
    ours |= {f"grad/{name}": g for name, g in named.items()} | {f"norm/{name}": n for name, n in norms.items()}
    if quantized:
        seen = jax.jit(lambda p: fake_quantize(plain, p, 1.0))(case.params)
        ours |= {f"weight/{name}": w for name, w in to_tensors(plain, seen).items()}
    case.compare(ours)

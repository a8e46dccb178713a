"""Forward passes and gradients: logits, losses, activations, hash buckets; d loss / d every parameter."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import ModelConfig
from golf_jax.interop.reference import Case, NotComputed
from golf_jax.kernels.attention import xsa_attention
from golf_jax.model import layers as ops
from golf_jax.model import logits, to_tensors
from golf_jax.model.fake_quant import fake_quantize
from golf_jax.model.gpt import nll


def _text(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Inputs and targets, int32 [B, T], and the document of each input, where attention stays inside."""
    if "tokens" not in case.seen:
        raise NotComputed("has no tokens")
    tokens, segments = case.seen["tokens"].astype(np.int32), case.seen.get("segments")
    return tokens[..., :-1], tokens[..., 1:], None if segments is None else segments.astype(np.int32)


def check_model(case: Case) -> None:
    x, y, segments = _text(case)
    config, looping = case.model, case.looping
    head: dict[str, Any] = {"looping": looping, "training": not case.settings.get("eval_softcap")}

    def forward(params: dict, x_BT: jax.Array, y_BT: jax.Array, segments_BT: jax.Array | None):
        taps: dict[str, jax.Array] = {}
        out = logits(config, params, x_BT, segments_BT=segments_BT, tap=taps.__setitem__, **head)
        return out, nll(config, params, x_BT, y_BT, segments_BT=segments_BT, **head), taps

    key = ("forward", config, *head.values())
    compiled = case.refs.once(key, lambda: jax.jit(forward))
    out, losses, taps = jax.tree.map(np.asarray, compiled(case.params, x, y, segments))
    wide = out.astype(np.float64)
    ours = {"logits": out, "nll": losses, "loss": losses.mean(dtype=np.float64), "logsumexp": np.log(np.exp(wide).sum(-1))}
    encoder, decoder = config.layer_order(looping)
    ours["layer_order"] = np.array(encoder + decoder)
    ours |= {f"acts/{name}": x for name, x in activations(taps, segments).items()} | hash_ids(config, x)
    case.compare(ours)


def activations(taps: dict[str, np.ndarray], segments: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Taps by the format's names: without the layer, and with plain attention beside XSA's."""
    named = {"/".join(name.split("/")[:1] + name.split("/")[2:]) if name.count("/") == 2 else name: x for name, x in taps.items()}
    first = None if segments is None else ops.first_visible(jnp.asarray(segments))
    for step in [name.split("/")[0] for name in named if name.endswith("/q")]:
        q, k, v = (jnp.asarray(named[f"{step}/{part}"]) for part in "qkv")
        named[f"{step}/sdpa"] = np.asarray(xsa_attention(q, k, v, xsa=False, first_BS=first))
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
    x, y, segments = _text(case)
    quantized, looping = bool(case.settings.get("fake_quant")), case.looping
    plain = replace(case.model, fake_quant=replace(case.model.fake_quant, in_eval=False))

    def mean_loss(params: dict, x_BT: jax.Array, y_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        strength = 1.0 if quantized else None
        return jnp.mean(nll(plain, params, x_BT, y_BT, segments_BT=segments_BT, looping=looping, fake_quant=strength, training=True))

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))({k: jnp.asarray(v) for k, v in case.params.items()}, x, y, segments)
    named = to_tensors(plain, grads)
    norms = {name: np.linalg.norm(g.astype(np.float64)) for name, g in named.items()}
    ours: dict[str, Any] = {"loss": loss, "grad_norm": np.sqrt(sum(n**2 for n in norms.values()))}
    ours |= {f"grad/{name}": g for name, g in named.items()} | {f"norm/{name}": n for name, n in norms.items()}
    if quantized:
        seen = jax.jit(lambda p: fake_quantize(plain, p, 1.0))(case.params)
        ours |= {f"weight/{name}": w for name, w in to_tensors(plain, seen).items()}
    case.compare(ours)

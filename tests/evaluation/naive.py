"""A plain scorer in NumPy float64: one window at a time, one head at a time. Slow, and easy to believe.

It covers the basic network (ModelConfig with defaults: relu^2, full RoPE, additive skips), which is enough to check the machinery of
golf_jax.evaluation: windows, sums, bytes, sharding, last-N scoring.
"""

import numpy as np

from golf_jax.config import ModelConfig


def rms_norm(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1.1920929e-07)


def rotate(x, base):
    """RoPE on [T, K]: the two halves of a head are the coordinates of K/2 planes."""
    seq_len, dim = x.shape
    angle = np.arange(seq_len)[:, None] / base ** (np.arange(0, dim, 2) / dim)
    a, b = x[:, : dim // 2], x[:, dim // 2 :]
    return np.concatenate([a * np.cos(angle) + b * np.sin(angle), b * np.cos(angle) - a * np.sin(angle)], 1)


def attention(config: ModelConfig, p, i, x):
    q, k, v = x @ p["q"][i], x @ p["k"][i], x @ p["v"][i]
    dim, group = config.head_dim, config.num_heads // config.num_kv_heads
    future = np.triu(np.ones((len(x), len(x)), bool), 1)
    heads = []
    for h in range(config.num_heads):
        mine, shared = slice(h * dim, (h + 1) * dim), slice(h // group * dim, (h // group + 1) * dim)
        qh = rotate(rms_norm(q[:, mine]), config.rope_base) * p["q_gain"][i, h]
        kh = rotate(rms_norm(k[:, shared]), config.rope_base)
        scores = np.where(future, -np.inf, qh @ kh.T / np.sqrt(dim))
        weights = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(weights / weights.sum(1, keepdims=True) @ v[:, shared])
    return np.concatenate(heads, 1) @ p["o"][i]


def log_probabilities(config: ModelConfig, params, tokens):
    """log p of every next token at every position, [T, V], for one window of inputs."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x0 = x = rms_norm(p["tok_emb"][tokens])
    half, skips = config.num_layers // 2, []
    for i in range(config.num_layers):
        if i >= half and skips:
            x = x + p["skip_weights"][i - half] * skips.pop()
        x = p["resid_mix"][i, 0] * x + p["resid_mix"][i, 1] * x0
        x = x + p["attn_scale"][i] * attention(config, p, i, rms_norm(x))
        hidden = np.maximum(rms_norm(x) @ p["up"][i], 0) ** 2
        x = x + p["mlp_scale"][i] * (hidden @ p["down"][i])
        if i < half:
            skips.append(x)
    logits = config.softcap * np.tanh(rms_norm(x) @ p["tok_emb"].T / config.softcap)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def score(config: ModelConfig, params, tokens, tables, windows):
    """(nats, tokens, bytes) over a list of (start, length, score_from)."""
    nats, count, size = 0.0, 0, 0
    for start, length, score_from in windows:
        log_p = log_probabilities(config, params, tokens[start : start + length])
        for offset in range(score_from, length):
            previous, target = int(tokens[start + offset]), int(tokens[start + offset + 1])
            nats -= log_p[offset, target]
            count += 1
            size += int(tables.base_bytes[target])
            size += int(tables.has_leading_space[target] and not tables.is_boundary[previous])
    return nats, count, size

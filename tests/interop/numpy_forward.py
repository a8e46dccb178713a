"""The network once more, in numpy and float64, from docs/recipes/ alone: one row, one position, one head at a time.

It shares nothing with golf_jax: no JAX, no configuration, no parameter table. Weights go by the challenge's names, `(out, in)`. `v` is a
dictionary of what the variant has: heads, kv_heads, layers, rope (dimensions, base, trained length), softcap, slope, and the techniques.
"""

import numpy as np


def norm(x):
    return x / np.sqrt((x * x).mean() + np.float64(np.finfo(np.float32).eps))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def turned(x, position, v, length):
    """RoPE of one head's vector at a position: pairs (i, i + r/2) of the first r dimensions by minus the angle."""
    r, base = v["rope_dims"], v["rope_base"]
    if v["rope_train_len"] and length > v["rope_train_len"]:
        base *= (length / v["rope_train_len"]) ** (r / (r - 2))
    y = x.copy()
    for i in range(r // 2):
        angle = position * base ** (-2 * i / r)
        a, b = x[i], x[i + r // 2]
        y[i], y[i + r // 2] = a * np.cos(angle) + b * np.sin(angle), b * np.cos(angle) - a * np.sin(angle)
    return y


def hashes(row, t, buckets, order, shallow):
    """Bucket of a bigram (order 2) or trigram (3); shallow: the second position's trigram is its bigram."""
    seen = min(t + 1, order)
    if seen < 2 or (seen < order and not shallow):
        return buckets - 1
    mixed = 0
    for back, prime in zip(range(seen), (36313, 27191, 51497), strict=False):
        mixed ^= prime * int(row[t - back])
    return mixed % (buckets - 1)


def embedded(p, v, row):
    """x0 of every position: table, hash tables, norm, smear."""
    states = []
    for t, token in enumerate(row):
        x = p["tok_emb.weight"][token].copy()
        if v.get("bigram"):
            table = p["bigram.embed.weight"]
            looked = table[hashes(row, t, len(table), 2, True)]
            if v.get("trigram") == "shared":
                looked = looked + table[hashes(row, t, len(table), 3, False)]
            x += p["bigram.scale"] * (p["bigram.proj.weight"] @ looked)
        if v.get("trigram") == "table":
            table = p["trigram.embed.weight"]
            x += p["trigram.scale"] * (p["trigram.proj.weight"] @ table[hashes(row, t, len(table), 3, True)])
        states.append(norm(x))
    if v.get("smear"):
        g = sigmoid(p["smear.gate"])
        states = [(1 - g) * x + g * (states[t - 1] if t else 0) for t, x in enumerate(states)]
    return states


def attended(p, v, i, z, first_values, embeds):
    """Attention output of every position of layer i on its normalised input, and the layer's own values."""
    w = {n.removeprefix(f"blocks.{i}.attn."): x for n, x in p.items() if n.startswith(f"blocks.{i}.attn.")}
    heads, groups, length = v["heads"], v["kv_heads"], len(z)
    q, k = [w["c_q.weight"] @ x for x in z], [(w["c_k.weight"] @ x).reshape(groups, -1) for x in z]
    own = [(w["c_v.weight"] @ x + (embeds[t] if embeds else 0)).reshape(groups, -1) for t, x in enumerate(z)]
    values = own
    if v.get("value_residual"):
        a, b = w["vr_lambda"]
        if first_values is not None:
            values = [a * old + b * new for old, new in zip(first_values, own, strict=True)]
        elif v.get("value_residual_first"):
            values = [(a + b) * new for new in own]
    size, out = k[0].shape[-1], []
    for t in range(length):
        mixed = []
        for h in range(heads):
            g = h // (heads // groups)
            query = turned(norm(q[t][h * size : (h + 1) * size]), t, v, length) * w["q_gain"][h]
            scores = np.array([query @ turned(norm(k[s][g]), s, v, length) for s in range(t + 1)]) / np.sqrt(size)
            share = np.exp(scores - scores.max())
            y = sum(c * values[s][g] for s, c in enumerate(share / share.sum()))
            if i >= v["layers"] - v.get("xsa", 0):
                unit = values[t][g] / max(np.linalg.norm(values[t][g]), 1e-12)
                y = y - (y @ unit) * unit
            if v.get("gate") == "linear":
                y = y * sigmoid(w["attn_gate.weight"][h] @ z[t] + w["attn_gate.bias"][h])
            if v.get("gate") == "query_rows":
                y = y * sigmoid(q[t][heads * size + h])
            mixed.append(y)
        out.append(w["proj.weight"] @ np.concatenate(mixed))
    return out, own


def block(p, v, i, x, x0, first_values, embeds):
    w, scale = {n.removeprefix(f"blocks.{i}."): a for n, a in p.items()}, (i + 1) ** -0.5 if v.get("layer_scale") else 1.0
    mixed = [w["resid_mix"][0] * a + w["resid_mix"][1] * b for a, b in zip(x, x0, strict=True)]
    z = [scale * norm(u) for u in mixed]
    a, own = attended(p, v, i, z, first_values, embeds)
    y = [u + w["attn_scale"] * o for u, o in zip(mixed, a, strict=True)]
    if not 0 <= v.get("parallel_from", -1) <= i:
        z = [scale * norm(u) for u in y]
    hidden = [w["mlp.fc.weight"] @ u for u in z]
    hidden = [np.where(u > 0, u, v["slope"] * u) ** 2 for u in hidden]
    return [u + w["mlp_scale"] * (w["mlp.proj.weight"] @ h) for u, h in zip(y, hidden, strict=True)], own


def logits(p, v, row):
    """Soft-capped logits [T, V] of one row of tokens."""
    x = x0 = embedded(p, v, row)
    embeds = {}
    for j, layer in enumerate(v.get("value_embed_layers", ())):
        shared = [p["ve_shared.scale"] * (p["ve_shared.proj.weight"] @ p["ve_shared.embed.weight"][token]) for token in row]
        embeds[layer] = [p[f"ve_layer_scales.{j}"] * s for s in shared]
    half, skips, first = len(v["order"]) // 2, [], None
    for step, i in enumerate(v["order"]):
        if step >= half and skips:
            skip, weight = skips.pop(), p["skip_weights"][step - half]
            if v.get("skip") == "gated":
                g = sigmoid(p["skip_gates"][step - half])
                x = [g * a + (1 - g) * weight * s for a, s in zip(x, skip, strict=True)]
            else:
                x = [a + weight * s for a, s in zip(x, skip, strict=True)]
        x, own = block(p, v, i, x, x0, first, embeds.get(i))
        first = own if first is None else first
        if step < half:
            skips.append(x)
    return np.array([v["softcap"] * np.tanh(p["tok_emb.weight"] @ norm(u) / v["softcap"]) for u in x])


def nll(p, v, tokens):
    """Nats of every target [B, T] of rows of tokens [B, T+1]."""
    found = []
    for row in tokens:
        z = logits(p, v, row[:-1])
        total = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1)
        found.append(total - z[np.arange(len(z)), row[1:]])
    return np.array(found)


def slopes(p, v, tokens, name, points, step=1e-5):
    """d mean nll / d the tensor at each of `points` [n, axes], by central differences."""
    found = []
    for point in points:
        sides = []
        for sign in (1, -1):
            moved = {**p, name: p[name].copy()}
            moved[name][tuple(point)] += sign * step
            sides.append(nll(moved, v, tokens).mean())
        found.append((sides[0] - sides[1]) / (2 * step))
    return np.array(found)

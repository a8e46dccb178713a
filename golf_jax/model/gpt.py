"""The forward pass: one pure function for all recipes, unrolled over layers because they differ.

`hidden` maps tokens to the normalised state before the head; `nll` and `logits` put the tied head on it. A thin Linen module owns
the parameters (`GPT`). `tap(name, x)`, where given, receives intermediate activations: calibration of GPTQ and the reference tensors
of `golf_jax.reproduce` read them there instead of through a second forward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from golf_jax.config import GolfError, ModelConfig
from golf_jax.kernels.attention import SUFFIX, has_factors, xsa_attention
from golf_jax.kernels.cross_entropy import softcap_cross_entropy, softcap_logits
from golf_jax.kernels.maps import Packed, squared_leaky_mlp
from golf_jax.kernels.mlp import squared_leaky_linear
from golf_jax.model import layers as ops
from golf_jax.model.cache import Cache
from golf_jax.model.inputs import check_params, check_tokens
from golf_jax.model.params import Params
from golf_jax.model.platforms import for_default_platform
from golf_jax.model.weights import Weights, weights_of

Tap = Callable[[str, jax.Array], None]
# (what, input [B, T, D], output [B, T, O]) -> output: something added beside a map. what: q, v, o (of the attention's input), mlp, each
# after its executed layer ("3/q").
Branch = Callable[[str, jax.Array, jax.Array], jax.Array]
Attend = Callable[..., jax.Array]  # (q, k, v, xsa=) -> y: `xsa_attention`, or a cache's
Sight = tuple[jax.Array, int | None] | None  # first key that each position sees [B, T], most keys; None: all of the row


def hidden(
    config: ModelConfig,
    params: Params | Weights,
    tokens_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    longest: int | None = None,
    looping: bool = True,
    last: int | None = None,
    fake_quant: jax.Array | float | None = None,
    cache: Cache | None = None,
    tap: Tap | None = None,
    branch: Branch | None = None,
) -> jax.Array:
    """Normalised final state [B, T, D] in the activation dtype.

    config: without `auto`.
    params: or what `weights_of` made of them; then without `fake_quant`, `cache`, `tap` and `branch`.
    segments_BT: integers [B, T]; attention stays inside each run of equal ones. None: the row is one document.
    longest: length of the longest segment at most (not checked), where it is known: attention costs less on a CPU.
    looping: depth recurrence on (evaluation) or not (start of training); no effect without it in the config.
    last: compute only the last N positions of the last block and of the result: [B, N, D]. Everything before is needed in full.
    fake_quant: strength of fake quantization, 0 to 1, may be traced; default is what evaluation uses (`config.fake_quant.in_eval`).
    branch: adds to the output of maps (adapters of test-time training); not with `last`.
    cache: go on with a row: tokens are `cache.window` of it, the result is that of its new positions, whose keys and values it takes in.
    Raises GolfError for tokens that are not integers [B, T] within the vocabulary, and for leaves that are not those of the model.
    """
    if "auto" in (config.dtype, config.attention):
        raise GolfError("model.dtype and model.attention are auto: resolve(config, platform), as Model.open does")
    tokens_BT, dtype = check_tokens(config, tokens_BT), jnp.dtype(config.dtype)
    plain = tap is branch is cache is None
    if not isinstance(params, Weights):
        params = weights_of(config, params, fake_quant=fake_quant, late=plain)
    elif not plain or fake_quant is not None:
        raise TypeError("fake_quant, cache, tap and branch need the parameters themselves")
    params, layers = params
    late = "attn_scale" not in layers[0]  # then it is in the map before it
    tap = tap or (lambda name, x: None)
    seq_len = tokens_BT.shape[1] if cache is None else cache.row_len
    last = None if last is None or last >= seq_len else last

    x_BTD, values = _embed(config, params, tokens_BT, dtype, tap)
    sight = None if segments_BT is None else (ops.first_visible(segments_BT), longest)
    rope = ops.rope_tables(
        seq_len, config.rope_dims or config.head_dim, config.rope_base, config.rope_train_len, config.rope_bf16_frequencies
    )
    if cache is not None:
        (x_BTD, values), rope = cache.new((x_BTD, values)), cache.turns(rope)
    x0_BTD, v0_BTGK, lane_BTD = x_BTD, None, None

    encoder, decoder = config.layer_order(looping)
    skips: list[jax.Array] = []
    for step, i in enumerate(encoder + decoder):
        j = step - len(encoder)
        if i == config.two_lanes_from:
            lane_BTD = x_BTD
        if 0 <= j < config.num_skips and skips:
            x_BTD = _skip(config, params, j, x_BTD, skips.pop(), dtype)
        _tap_lanes(tap, step, "in", x_BTD, lane_BTD)
        only = last if step == len(encoder + decoder) - 1 else None
        attend = None if cache is None else partial(cache.attend, step)
        x_BTD, lane_BTD, v_BTGK = _block(
            config, i, layers[i], x_BTD, lane_BTD, x0_BTD, v0_BTGK, values.get(i), rope, sight, only, _prefixed(tap, step, i), attend,
            branch and _at_step(branch, step), late,
        )  # fmt: skip
        v0_BTGK = v_BTGK if v0_BTGK is None else v0_BTGK
        _tap_lanes(tap, step, "out", x_BTD, lane_BTD)
        if j < 0:
            skips.append(x_BTD)
    if lane_BTD is not None:
        x_BTD = 0.5 * (x_BTD + lane_BTD)
    x_BTD = ops.rms_norm(x_BTD)
    tap("final_norm", x_BTD)
    return x_BTD


def _prefixed(tap: Tap, step: int, layer: int) -> Tap:
    return lambda name, x: tap(f"{step}/{layer}/{name}", x)


def _at_step(branch: Branch, step: int) -> Branch:
    return lambda what, z, y: branch(f"{step}/{what}", z, y)


def _tap_lanes(tap: Tap, step: int, where: str, x_BTD: jax.Array, lane_BTD: jax.Array | None) -> None:
    """The stream between blocks, or its two lanes as lane0 and lane1."""
    if lane_BTD is None:
        return tap(f"{step}/{where}", x_BTD)
    tap(f"{step}/lane0_{where}", x_BTD)
    tap(f"{step}/lane1_{where}", lane_BTD)


@jax.named_scope("embed")
def _embed(config: ModelConfig, params: Params, tokens_BT: jax.Array, dtype: jnp.dtype, tap: Tap) -> tuple[jax.Array, dict]:
    """Input state after hash embeddings, norm and smear, and the value embedding of each layer that has one."""
    start_BT = None if config.boundary_token < 0 else ops.starts(tokens_BT, config.boundary_token)
    x_BTD = params["tok_emb"].astype(dtype)[tokens_BT]
    tap("tok_emb", x_BTD)
    if config.bigram_buckets:
        table = params["bigram_table"].astype(dtype)
        hashed = table[ops.bigram_ids(tokens_BT, config.bigram_buckets, start_BT)]
        if config.trigram == "shared":
            hashed = hashed + table[ops.trigram_ids(tokens_BT, config.bigram_buckets, bigram_at_1=False, start_BT=start_BT)]
        x_BTD = x_BTD + _project(params, "bigram", hashed, tap)
    if config.trigram == "table":
        ids = ops.trigram_ids(tokens_BT, config.trigram_buckets, bigram_at_1=True, start_BT=start_BT)
        x_BTD = x_BTD + _project(params, "trigram", params["trigram_table"].astype(dtype)[ids], tap)
    tap("emb_sum", x_BTD)
    if config.input_smear_gate:
        x_BTD = ops.input_smear(x_BTD, params["smear_w"], params["smear_lambda"], start_BT)
        tap("smear", x_BTD)
    x_BTD = ops.rms_norm(x_BTD)
    tap("emb_norm", x_BTD)
    if config.smear_gate:
        x_BTD = ops.smear(x_BTD, params["smear_gate"], start_BT)
    tap("x0", x_BTD)
    values = {}
    if config.value_embed_layers:
        shared = _project(params, "ve_shared", params["ve_shared_table"].astype(dtype)[tokens_BT], tap)
        scales = params["ve_layer_scales"].astype(dtype)
        values = {layer: scales[j] * shared for j, layer in enumerate(config.value_embed_layers)}
    return x_BTD, values


def _project(params: Params, name: str, x: jax.Array, tap: Tap) -> jax.Array:
    if f"{name}_proj" in params:
        x = ops.linear(x, params[f"{name}_proj"].astype(x.dtype))
    x = x * params[f"{name}_scale"].astype(x.dtype)
    tap(name, x)
    return x


@jax.named_scope("skip")
def _skip(config: ModelConfig, params: Params, j: int, x: jax.Array, skip: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """U-Net skip into decoder step j. `gated`: the gate weights the running stream, 1 - gate the scaled skip (PR 2005)."""
    scaled = params["skip_weights"][j].astype(dtype) * skip
    if config.skip == "add":
        return x + scaled
    g_D = jax.nn.sigmoid(params["skip_gates"][j].astype(dtype))
    return g_D * x + (1 - g_D) * scaled


def _block(
    config: ModelConfig,
    i: int,
    w: Params,
    x_BTD: jax.Array,
    lane_BTD: jax.Array | None,
    x0_BTD: jax.Array,
    v0_BTGK: jax.Array | None,
    value_embed: jax.Array | None,
    rope: tuple[jax.Array, jax.Array],
    sight: Sight,
    last: int | None,
    tap: Tap,
    attend: Attend | None,
    branch: Branch | None,
    late: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """One transformer block with the weights of physical layer i: the stream, its second lane, and the block's own, unmixed value.

    lane: None, or what the MLP reads (PR 2135, 3.7); then attention and MLP write to both lanes and do not see each other.
    late: norms scale what the maps make of their input, so that the normalised state never meets memory; w has no output scales.
    """
    scale = (i + 1) ** -0.5 if config.layer_scale else 1.0

    def norm(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return (x, ops.inverse_rms(x) * scale) if late else (ops.rms_norm(x) * jnp.asarray(scale, x.dtype), None)

    u_BTD = w["resid_mix"][0] * x_BTD + w["resid_mix"][1] * x0_BTD
    z_BTD, r_BT1 = norm(u_BTD)
    tap("attn_in", z_BTD)
    a_BTD, v_BTGK = attention(config, i, w, z_BTD, v0_BTGK, value_embed, rope, last, tap, sight, attend, branch, r_BT1)
    if branch:
        a_BTD = branch("o", z_BTD, a_BTD)
    tap("attn_out", a_BTD)
    if last is not None:
        x_BTD, u_BTD, z_BTD = (x[:, -last:] for x in (x_BTD, u_BTD, z_BTD))
        lane_BTD, r_BT1 = (None if x is None else x[:, -last:] for x in (lane_BTD, r_BT1))
    a_BTD = a_BTD if late else w["attn_scale"] * a_BTD
    y_BTD = u_BTD + a_BTD if lane_BTD is None else lane_BTD
    parallel = 0 <= config.parallel_from <= i
    if not parallel:
        z_BTD, r_BT1 = norm(y_BTD)
    tap("mlp_in", z_BTD)
    m_BTD = mlp(config, w, z_BTD, tap, r_BT1)
    if branch:
        m_BTD = branch("mlp", z_BTD, m_BTD)
    tap("mlp_out", m_BTD)
    m_BTD = m_BTD if late else w["mlp_scale"] * m_BTD
    if lane_BTD is None:
        return y_BTD + m_BTD, None, v_BTGK
    post, resid = w["lane_post"], w["lane_resid"]  # [attention or MLP, receiving lane], [lane]
    x_BTD, lane_BTD = (resid[n] * lane + post[0, n] * a_BTD + post[1, n] * m_BTD for n, lane in enumerate((x_BTD, lane_BTD)))
    return x_BTD, lane_BTD, v_BTGK


@jax.named_scope("attention")
def attention(
    config: ModelConfig,
    i: int,
    w: Params,
    z_BTD: jax.Array,
    v0_BTGK: jax.Array | None,
    value_embed: jax.Array | None,
    rope: tuple[jax.Array, jax.Array],
    last: int | None,
    tap: Tap,
    sight: Sight = None,
    attend: Attend | None = None,
    branch: Branch | None = None,
    r_BT1: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of layer i with its own weights w on the normalised input: output [B, T, D] and its unmixed value [B, T, G, K].

    v0: value of layer 0 (None in it); value_embed [B, T, G K]; last: only the last N queries; attend: instead of `xsa_attention`.
    r: float32 [B, T, 1], what the input is to be multiplied by, else None.
    """
    c = config
    b, t = z_BTD.shape[:2]
    s = t if last is None else last
    maps = _input_maps(w, z_BTD, last)
    q_eps = k_eps = ops.EPS
    if r_BT1 is not None:  # the norms of q and k take it out again, but for their eps
        k_eps = (ops.EPS / jnp.square(r_BT1))[:, :, None]
        q_eps = k_eps[:, t - s :]
    if branch:
        maps |= {name: branch(name, z_BTD, maps[name]) for name in ("q", "v")}
    qg = maps["q"]
    tap("q_proj", qg)
    q_BSHK = qg[..., : c.width].reshape(b, s, c.num_heads, c.head_dim)
    k_BTGK = maps["k"].reshape(b, t, c.num_kv_heads, c.head_dim)
    v_BTGK = maps["v"].reshape(k_BTGK.shape)
    backend = c.attention if last is None or c.attention in SUFFIX else "xla"
    of_r = has_factors(backend) and not c.value_residual and value_embed is None  # v is r times a map: dv.v is its part of r's gradient
    if r_BT1 is not None:
        v_BTGK = ops.times(v_BTGK, (jax.lax.stop_gradient(r_BT1) if of_r else r_BT1)[:, :, None])
    if value_embed is not None:
        v_BTGK = v_BTGK + value_embed.reshape(k_BTGK.shape)
    raw_BTGK = v_BTGK
    tap("k_proj", k_BTGK)
    tap("v_raw", raw_BTGK)
    if c.value_residual:
        lam = w["vr_lambda"]
        if v0_BTGK is not None:
            v_BTGK = lam[0] * v0_BTGK + lam[1] * raw_BTGK
        elif c.value_residual_first:
            v_BTGK = (lam[0] + lam[1]) * raw_BTGK
    cos, sin = rope
    inside = {}
    if r_BT1 is not None and has_factors(backend):  # gradients of norms and gain come from the kernels
        rms = ops.inverse_rms(q_BSHK, q_eps), ops.inverse_rms(k_BTGK, k_eps)
        q_BSHK, k_BTGK = (ops.times(x, jax.lax.stop_gradient(r)) for x, r in zip((q_BSHK, k_BTGK), rms, strict=True))
        log_v = jnp.broadcast_to(jnp.log(r_BT1) if of_r else 0.0, k_BTGK.shape[:3])
        inside["factors"] = (w["q_gain"], *(jnp.log(r)[..., 0] for r in rms), log_v)
    else:
        q_BSHK, k_BTGK = ops.rms_norm(q_BSHK, q_eps), ops.rms_norm(k_BTGK, k_eps)
    q_BSHK, k_BTGK = ops.rope(q_BSHK, cos[t - s :], sin[t - s :]), ops.rope(k_BTGK, cos, sin)
    tap("q_rope", q_BSHK)
    if not inside:
        q_BSHK = q_BSHK * w["q_gain"][:, None]
    tap("q", q_BSHK)
    tap("k", k_BTGK)
    tap("v", v_BTGK)
    xsa = i >= c.num_layers - c.xsa_last_n
    first_BT, longest = sight or (None, None)
    first_BS = None if first_BT is None else first_BT[:, t - s :]
    gate_BSH = _gate(c, w, maps, z_BTD[:, t - s :], None if r_BT1 is None else r_BT1[:, t - s :])
    if gate_BSH is not None:
        tap("gate", gate_BSH)
        gate_BSH = gate_BSH * c.head_gate_scale if c.head_gate == "narrow" else gate_BSH
    # What has no gate yet never meets memory (nor `y`). With a gate in the query rows more bytes are moved that way (benchmarks/aot.md).
    if c.head_gate != "off" and (r_BT1 is not None or c.head_gate == "linear") and attend is None and backend == "pallas":
        inside["gate_BSH"], gate_BSH = gate_BSH, None
    attend = attend or partial(xsa_attention, first_BS=first_BS, longest=longest, backend=backend, **inside)
    y_BSHK = attend(q_BSHK, k_BTGK, v_BTGK, xsa=xsa)
    tap("y", y_BSHK)
    if gate_BSH is not None:
        y_BSHK = y_BSHK * jax.nn.sigmoid(gate_BSH)[..., None]
    y_BSD = y_BSHK.reshape(b, s, -1)
    tap("o_in", y_BSD)
    return ops.linear(y_BSD, w["o"]), raw_BTGK


def _gate(c: ModelConfig, w: Params, maps: Params, z_BSD: jax.Array, r_BS1: jax.Array | None) -> jax.Array | None:
    """Logits of each head's gate [B, S, H]."""
    if c.head_gate == "off":
        return None
    if c.head_gate == "narrow":
        gate_BSH = ops.linear(z_BSD[..., : c.gate_window], w["narrow_gate"])
    else:
        gate_BSH = maps["gate"] if "gate" in maps else maps["q"][..., c.width :]
    gate_BSH = gate_BSH if r_BS1 is None else ops.times(gate_BSH, r_BS1)
    return gate_BSH + w["gate_bias"] if c.head_gate == "linear" else gate_BSH


def _input_maps(w: Params, z_BTD: jax.Array, last: int | None) -> Params:
    """q, k, v and the linear gate of the normalised input; with `last`, queries and gates of the last positions only."""
    names = [name for name in ("q", "k", "v", "gate") if name in w]
    if last is None:
        return dict(zip(names, ops.linears(z_BTD, *(w[name] for name in names)), strict=True))
    return {name: ops.linear(z_BTD if name in ("k", "v") else z_BTD[:, -last:], w[name]) for name in names}


@jax.named_scope("mlp")
def mlp(config: ModelConfig, w: Params, z_BTD: jax.Array, tap: Tap = lambda name, x: None, r_BT1: jax.Array | None = None) -> jax.Array:
    """(leaky_relu(r z W_up))^2 W_down; r float32 [B, T, 1], None is 1."""
    slope = config.mlp_slope
    if isinstance(w["up"], Packed) and isinstance(w["down"], Packed) and r_BT1 is not None:
        y_MD = squared_leaky_mlp(z_BTD.reshape(-1, z_BTD.shape[-1]), r_BT1.reshape(-1), w["up"], w["down"], slope)
        return y_MD.reshape(z_BTD.shape)
    u_BTF = ops.linear(z_BTD, w["up"])
    if r_BT1 is not None and config.mlp == "pallas":
        return squared_leaky_linear(u_BTF.reshape(-1, u_BTF.shape[-1]), r_BT1.reshape(-1), w["down"], slope).reshape(z_BTD.shape)
    h_BTF: Any = ops.squared_leaky(u_BTF, slope) if r_BT1 is None else ops.scaled_squared_leaky(u_BTF, r_BT1, slope)
    tap("down_in", h_BTF)
    return ops.linear(h_BTF, w["down"], config.attention)


def nll(
    config: ModelConfig,
    params: Params | Weights,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    longest: int | None = None,
    looping: bool = True,
    last: int | None = None,
    fake_quant: jax.Array | float | None = None,
    training: bool = False,
) -> jax.Array:
    """Negative log-likelihood of each target in nats, float32 [B, T] (or of the last N targets, [B, N], see `hidden`).

    targets_BT has one entry per returned position: pass the last N targets when `last` is N. training: see `head_softcap`.
    `auto` in the config becomes what the default platform gets.
    """
    config = for_default_platform(config, segments_BT is not None)
    x_BTD = hidden(config, params, tokens_BT, segments_BT=segments_BT, longest=longest, looping=looping, last=last, fake_quant=fake_quant)
    params = params.whole if isinstance(params, Weights) else params
    softcap = head_softcap(config, params, training)
    with jax.named_scope("head"):
        flat = softcap_cross_entropy(
            x_BTD.reshape(-1, config.width), jnp.asarray(params["tok_emb"]), targets_BT.reshape(-1), softcap=softcap
        )
    return flat.reshape(targets_BT.shape)


def head_softcap(config: ModelConfig, params: Params, training: bool = False) -> float | tuple[jax.Array, jax.Array]:
    """The softcap of the logits: `config.softcap`, or in evaluation with `asym_softcap` one for either sign (PR 2135, 3.9)."""
    return (params["softcap_pos"], params["softcap_neg"]) if config.asym_softcap and not training else config.softcap


def logits(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    looping: bool = True,
    cache: Cache | None = None,
    training: bool = False,
    tap: Tap | None = None,
) -> jax.Array:
    """Soft-capped next-token logits, float32 [B, T, V], by default as evaluation computes them (PR 372: with fake quantization).

    `auto` in the config becomes what the default platform gets.
    """
    tokens_BT, params = check_tokens(config, tokens_BT), check_params(config, params)
    config = for_default_platform(config, segments_BT is not None)
    x_BTD = hidden(config, params, tokens_BT, segments_BT=segments_BT, looping=looping, cache=cache, tap=tap)
    return softcap_logits(x_BTD, params["tok_emb"], softcap=head_softcap(config, params, training))

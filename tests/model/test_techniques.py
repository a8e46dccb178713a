"""Every technique is live, on its own and together with all others: switching it changes the output, its parameters get gradients."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golf_jax.config import FakeQuantConfig, GolfError, ModelConfig
from golf_jax.kernels.native import library
from golf_jax.model import count, hidden, leaves, logits, nll, resolve
from golf_jax.model.params import dead_layers, from_tensors, to_tensors

PLAIN = ModelConfig(vocab_size=40, num_layers=3, width=16, num_heads=4, num_kv_heads=2, mlp_ratio=2.0, dtype="float32", attention="xla")
FAKE = FakeQuantConfig(matrices="all", in_eval=True)
# Technique -> (changed fields, the parameters it adds).
TECHNIQUES = {
    "leaky relu": (dict(mlp_slope=0.5), ()),
    "partial rope": (dict(rope_dims=2), ()),
    "rope base": (dict(rope_base=500.0), ()),
    "rope rescaled": (dict(rope_train_len=4), ()),
    "rope in bfloat16": (dict(rope_base=500_000.0, rope_bf16_frequencies=True), ()),
    "softcap": (dict(softcap=3.0), ()),
    "softcap of either sign": (dict(asym_softcap=True), ("softcap_pos", "softcap_neg")),
    "smear gate": (dict(smear_gate=True), ("smear_gate",)),
    "input-gated smear": (dict(input_smear_gate=True, gate_window=4), ("smear_lambda", "smear_w")),
    "bigram hash": (dict(bigram_buckets=32, bigram_dim=8), ("bigram_table", "bigram_proj", "bigram_scale")),
    "bigram hash without projection": (dict(bigram_buckets=32, bigram_dim=16), ("bigram_table", "bigram_scale")),
    "trigram into the bigram table": (dict(bigram_buckets=32, bigram_dim=8, trigram="shared"), ("bigram_table",)),
    "trigram table": (dict(trigram="table", trigram_buckets=32, trigram_dim=8), ("trigram_table", "trigram_proj", "trigram_scale")),
    "xsa": (dict(xsa_last_n=2), ()),
    "xsa everywhere": (dict(xsa_last_n=3), ()),
    "value residual": (dict(value_residual=True), ("vr_lambda",)),
    "value residual, first layer scaled": (dict(value_residual=True, value_residual_first=True), ("vr_lambda",)),
    "linear head gate": (dict(head_gate="linear"), ("gate", "gate_bias")),
    "head gate in query rows": (dict(head_gate="query_rows"), ("q",)),
    "narrow head gate": (dict(head_gate="narrow", gate_window=4), ("narrow_gate",)),
    "layer scale": (dict(layer_scale=True), ()),
    "value embedding": (
        dict(value_embed_layers=(0, 2), value_embed_dim=4),
        ("ve_shared_table", "ve_shared_proj", "ve_shared_scale", "ve_layer_scales"),
    ),
    "gated skips": (dict(skip="gated"), ("skip_gates", "skip_weights")),
    "parallel residual": (dict(parallel_from=1), ()),
    "two lanes": (dict(two_lanes_from=1), ("lane_post", "lane_resid")),
    "depth recurrence": (dict(loop_start=1, loop_end=1, loop_repeats=2), ("skip_weights",)),
    "fake quantization": (dict(fake_quant=FAKE), ()),
    "fake quantization with a floor": (dict(fake_quant=replace(FAKE, scale_floor=1 / 31)), ()),
    "late key exempt": (dict(fake_quant=replace(FAKE, late_k_layers=1)), ()),
    "int5 mlp": (dict(fake_quant=replace(FAKE, mlp_levels=15)), ()),
}
ALL = dict(
    mlp_slope=0.5, rope_dims=2, smear_gate=True, bigram_buckets=32, bigram_dim=8, trigram="table", trigram_buckets=32, trigram_dim=8,
    xsa_last_n=2, value_residual=True, head_gate="linear", layer_scale=True, value_embed_layers=(0, 2), value_embed_dim=4, skip="gated",
    parallel_from=2, loop_start=1, loop_end=1, loop_repeats=1, fake_quant=FAKE,
)  # fmt: skip
# What excludes a technique of ALL, or adds to it: PR 2135's.
ALL_2135 = ALL | dict(
    input_smear_gate=True, gate_window=4, head_gate="narrow", head_gate_scale=0.5, parallel_from=-1, two_lanes_from=2, asym_softcap=True,
)  # fmt: skip


def noisy_params(config):
    """Noise everywhere, so that nothing is dead because it starts at zero; scales and gains around their start. Equal leaves are equal."""
    params = {}
    for name, leaf in leaves(config).items():
        noise = 0.4 * np.random.default_rng(sum(map(ord, name))).standard_normal(leaf.shape)
        start = leaf.init(jax.random.key(0), leaf.shape) if leaf.role == "vector" else 0.0
        params[name] = jnp.asarray(start + noise, jnp.float32)
    return params


def tokens(batch=2, length=12):
    rng = np.random.default_rng(0)
    return rng.integers(0, 40, (batch, length)), rng.integers(0, 40, (batch, length))


def jitted(function, *arguments):
    return np.asarray(jax.jit(function)(*arguments))


@functools.cache
def output(config):
    """Logits of the noisy parameters."""
    return jitted(lambda p, x: logits(config, p, x), noisy_params(config), tokens()[0])


def gradients(config):
    x, y = tokens()
    return jax.jit(jax.grad(lambda p: jnp.mean(nll(config, p, x, y))))(noisy_params(config))


def assert_alive(config, grads, names):
    for name in names:
        g = np.asarray(grads[name])
        g = g[dead_layers(config, name) :] if g.ndim else g
        assert np.isfinite(g).all() and np.abs(g).max() > 1e-7, name


@pytest.mark.parametrize("name", TECHNIQUES)
def test_it_changes_the_output_and_its_parameters_have_gradients(name):
    changes, parameters = TECHNIQUES[name]
    config = replace(PLAIN, **changes)
    out = output(config)
    assert np.isfinite(out).all() and np.abs(out).max() <= config.softcap
    assert np.abs(out - output(PLAIN)).max() > 1e-4
    if parameters:
        assert_alive(config, gradients(config), parameters)


def test_rope_frequencies_in_bfloat16_are_other_frequencies():
    base = replace(PLAIN, rope_base=500_000.0)
    assert np.abs(output(replace(base, rope_bf16_frequencies=True)) - output(base)).max() > 1e-6


@pytest.mark.parametrize(
    ("fields", "others"),
    [
        (dict(fake_quant=FAKE), dict(fake_quant=replace(FAKE, late_k_layers=1))),
        (dict(fake_quant=FAKE), dict(fake_quant=replace(FAKE, mlp_levels=15))),
        (dict(fake_quant=FAKE), dict(fake_quant=replace(FAKE, min_numel=300))),
        (dict(value_residual=True), dict(value_residual=True, value_residual_first=True)),
        (dict(head_gate="narrow", gate_window=4), dict(head_gate="narrow", gate_window=4, head_gate_scale=0.5)),
        (dict(smear_gate=True), dict(smear_gate=True, boundary_token=25)),
        (dict(input_smear_gate=True, gate_window=4), dict(input_smear_gate=True, gate_window=4, boundary_token=25)),
        (dict(bigram_buckets=32, bigram_dim=8), dict(bigram_buckets=32, bigram_dim=8, boundary_token=25)),
    ],
)
def test_refinements_change_what_they_refine(fields, others):
    assert np.abs(output(replace(PLAIN, **fields)) - output(replace(PLAIN, **others))).max() > 1e-5


@pytest.mark.parametrize("all_techniques", [ALL, ALL_2135])
def test_all_techniques_together(all_techniques):
    config = replace(PLAIN, **all_techniques)
    assert np.isfinite(output(config)).all()
    assert_alive(config, gradients(config), leaves(config))


@pytest.mark.parametrize("name", ["xsa_last_n", "smear_gate", "value_residual", "head_gate", "parallel_from", "layer_scale", "skip"])
def test_each_still_matters_among_all_others(name):
    off = {"xsa_last_n": 0, "smear_gate": False, "value_residual": False, "head_gate": "off", "parallel_from": -1}
    off |= {"layer_scale": False, "skip": "add"}
    config = replace(PLAIN, **ALL)
    assert np.abs(output(config) - output(replace(config, **{name: off[name]}))).max() > 1e-4


@pytest.mark.parametrize("name", ["input_smear_gate", "head_gate", "two_lanes_from", "asym_softcap"])
def test_each_of_pr2135_still_matters_among_all_others(name):
    off = {"input_smear_gate": False, "head_gate": "off", "two_lanes_from": -1, "asym_softcap": False}
    config = replace(PLAIN, **ALL_2135)
    assert np.abs(output(config) - output(replace(config, **{name: off[name]}))).max() > 1e-4


def test_the_training_loss_keeps_the_one_softcap():
    config, (x, y) = replace(PLAIN, asym_softcap=True), tokens()
    plain = noisy_params(PLAIN)
    params = plain | {"softcap_pos": jnp.float32(5.0), "softcap_neg": jnp.float32(7.0)}
    training = jitted(lambda p: nll(config, p, x, y, training=True), params)
    np.testing.assert_array_equal(training, jitted(lambda p: nll(PLAIN, p, x, y), plain))
    assert np.abs(training - jitted(lambda p: nll(config, p, x, y), params)).max() > 1e-4


@pytest.mark.parametrize("all_techniques", [ALL, ALL_2135])
def test_no_position_sees_a_later_token(all_techniques):
    """Gradient of every position's logits with respect to the embedded tokens after it is exactly zero."""
    no_hash = {"fake_quant": FakeQuantConfig(), "bigram_buckets": 0, "trigram": "off", "trigram_buckets": 0}
    config = replace(PLAIN, **(all_techniques | no_hash))
    params = noisy_params(config) | {"tok_emb": jnp.asarray(np.random.default_rng(3).standard_normal((40, 16)), jnp.float32)}
    x = np.arange(12)[None]  # every token once: row t of the table is position t alone
    head = params["tok_emb"]

    def state(table):
        return hidden(config, params | {"tok_emb": table}, x)[0].sum(-1)

    seen = np.abs(np.asarray(jax.jit(jax.jacrev(state))(head))).sum(-1)[:, :12]  # [position, token]
    assert (np.triu(seen, 1) == 0).all() and (np.diag(seen) > 0).all()


def test_the_hash_uses_no_later_token():
    config = replace(PLAIN, bigram_buckets=32, bigram_dim=8, trigram="table", trigram_buckets=32, trigram_dim=8)
    params, (x, _) = noisy_params(config), tokens()
    changed = x.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % 40
    both = jitted(lambda p, x: logits(config, p, x), params, np.concatenate([x, changed]))
    a, b = both[:2], both[2:]
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert np.abs(a[:, 7:] - b[:, 7:]).max() > 1e-3


BOS = 1
DOCUMENTS = np.array([[0] * 5 + [1] * 4 + [2] * 3, [0] * 5 + [1] * 4 + [2] * 3])  # of 12 tokens, each of the last two opened by BOS


def packed_rows():
    """Rows of three documents, and the same with another middle one (its BOS kept)."""
    x = np.where(tokens()[0] == BOS, BOS + 1, tokens()[0])
    x[:, [5, 9]] = BOS
    changed = x.copy()
    changed[:, 6:9] = (changed[:, 6:9] + 7) % 38 + 2
    return x, changed


# Every technique that looks back, and all together.
LOOKING_BACK = ("smear gate", "input-gated smear", "bigram hash", "trigram into the bigram table", "trigram table")
LOOKING_BACK = {name: TECHNIQUES[name][0] for name in LOOKING_BACK} | {"all": ALL, "all of PR 2135": ALL_2135}


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_documents_of_a_row_do_not_see_each_other(name):
    config = replace(PLAIN, **LOOKING_BACK[name], boundary_token=BOS)
    params, both = noisy_params(config), np.concatenate(packed_rows())
    out = jitted(lambda p, x: logits(config, p, x, segments_BT=np.concatenate([DOCUMENTS] * 2)), params, both)
    changed = np.abs(out[:2] - out[2:]).max(-1) > 0
    assert changed[:, 6:9].any() and not changed[:, :6].any() and not changed[:, 9:].any()


@pytest.mark.parametrize("name", ["smear gate", "input-gated smear", "bigram hash", "trigram table"])
def test_without_the_boundary_token_it_leaks_into_the_next_document(name):
    config = replace(PLAIN, **LOOKING_BACK[name])
    params, both = noisy_params(config), np.concatenate(packed_rows())
    out = jitted(lambda p, x: logits(config, p, x, segments_BT=np.concatenate([DOCUMENTS] * 2)), params, both)
    changed = np.abs(out[:2] - out[2:]).max(-1) > 0
    assert changed[:, 9].all() and not changed[:, :6].any()


def test_documents_packed_in_a_row_score_as_rows_of_their_own():
    config = replace(PLAIN, **ALL_2135, boundary_token=BOS)
    params, (x, _) = noisy_params(config), packed_rows()
    packed = jitted(lambda p, x: logits(config, p, x, segments_BT=DOCUMENTS), params, x)
    alone = jitted(lambda p, x: logits(config, p, x), params, x[:, 5:9])
    np.testing.assert_allclose(packed[:, 5:9], alone, atol=1e-4)


@pytest.mark.parametrize(("all_techniques", "segments"), [(ALL, None), (ALL_2135, DOCUMENTS)])
def test_the_last_positions_alone_are_the_last_positions(all_techniques, segments):
    config = replace(PLAIN, **all_techniques)
    params, (x, y) = noisy_params(config), tokens()
    whole = jitted(lambda p, x, y: nll(config, p, x, y, segments_BT=segments), params, x, y)
    last = jitted(lambda p, x, y: nll(config, p, x, y, segments_BT=segments, last=5), params, x, y[:, -5:])
    np.testing.assert_allclose(last, whole[:, -5:], atol=1e-5)


def test_looping_off_is_the_plain_network():
    config = replace(PLAIN, num_layers=4, loop_start=1, loop_end=2, loop_repeats=2)
    assert config.layer_order(looping=True) == ((0, 1, 2, 1), (2, 1, 2, 3))
    assert config.layer_order(looping=False) == ((0, 1), (2, 3))
    params, (x, _) = noisy_params(config), tokens()
    off = jitted(lambda p, x: logits(config, p, x, looping=False), params, x)
    plain, fewer = replace(PLAIN, num_layers=4), params | {"skip_weights": params["skip_weights"][:2]}
    same = jitted(lambda p, x: logits(plain, p, x), fewer, x)
    np.testing.assert_allclose(off, same, atol=1e-6)


@pytest.mark.parametrize("all_techniques", [ALL, ALL_2135])
def test_tensors_round_trip_in_the_challenges_names(all_techniques):
    config = replace(PLAIN, **all_techniques)
    params = noisy_params(config)
    tensors = to_tensors(config, params)
    assert tensors["blocks.2.mlp.fc.weight"].shape == (config.mlp_dim, config.width)
    assert sum(t.size for t in tensors.values()) == count(config)
    back = from_tensors(config, tensors)
    assert all(np.array_equal(back[n], params[n]) for n in params)


def test_auto_is_resolved_by_platform(monkeypatch):
    monkeypatch.setattr(library, "compiler", lambda: "")
    for platform, found in (("cpu", ("float32", "xla")), ("gpu", ("bfloat16", "cudnn"))):
        config = resolve(ModelConfig(), platform)
        assert (config.dtype, config.attention) == found


def test_the_kernels_of_the_mlp_are_asked_for_by_name_and_go_with_those_of_attention():
    assert resolve(ModelConfig(attention="pallas"), "gpu").mlp == "xla"
    assert resolve(ModelConfig(attention="pallas", mlp="pallas"), "gpu").mlp == "pallas"
    for config, here in ((ModelConfig(), "attention cudnn"), (ModelConfig(attention="pallas", mlp_ratio=2.2), "1126 hidden units")):
        with pytest.raises(
            GolfError, match=f"model.mlp 'pallas' does not run on gpu with .*{here}.*: choose auto or xla; pallas needs a GPU"
        ):
            resolve(replace(config, mlp="pallas"), "gpu")


def test_documents_need_a_backend_that_has_their_mask():
    assert resolve(ModelConfig(), "gpu", documents=True).attention == "pallas"
    with pytest.raises(GolfError, match="'cudnn' does not run on gpu .* inside documents: choose auto or pallas, xla"):
        resolve(ModelConfig(attention="cudnn"), "gpu", documents=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(two_lanes_from=0), "two_lanes_from 0 must be -1 or in 1..2"),
        (dict(two_lanes_from=1, loop_start=0, loop_end=1, loop_repeats=1), "in 2..2"),
        (dict(two_lanes_from=2, parallel_from=2), "parallel_from and model.two_lanes_from"),
        (dict(head_gate="narrow", gate_window=17), "gate_window 17 must lie in 1..16"),
        (dict(boundary_token=40), "boundary_token 40 must be below 40"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(GolfError, match=message):
        replace(PLAIN, **changes)


def test_bfloat16_stays_close_to_float32():
    config = replace(PLAIN, **(ALL | {"fake_quant": FakeQuantConfig()}))
    a, b = output(config), output(replace(config, dtype="bfloat16"))
    assert b.dtype == np.float32
    assert 0 < np.sqrt(np.mean((a - b) ** 2)) < 0.2 * np.std(a)

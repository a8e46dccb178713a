"""Two reference sets of variants that no record has, computed by an independent float64 forward pass, are met and conform."""

import json

import numpy as np
import pytest
from interop import numpy_forward
from tiny_recipes import some

from golf_jax import reproduce
from golf_jax.interop.conformity import problems

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH, VOCAB, ROWS, LENGTH = 24, 40, 2, 9
# Many narrow heads, hash tables, a shared value embedding on two layers, XSA on the last two, a value residual that acts on layer 0.
HASHED = {
    "recipe": "pr1182",
    "config": {
        "model.num_layers": 4, "model.num_heads": 6, "model.num_kv_heads": 2, "model.mlp_ratio": 1.5, "model.rope_dims": 4,
        "model.rope_train_len": 6, "model.bigram_buckets": 17, "model.bigram_dim": 5, "model.trigram_buckets": 13, "model.trigram_dim": 7,
        "model.xsa_last_n": 2, "model.value_residual_first": True, "model.value_embed_layers": [1, 3], "model.value_embed_dim": 6,
        "model.head_gate": "linear", "model.softcap": 12.0, "model.mlp_slope": 0.2,
    },
    "variant": {
        "layers": 4, "order": (0, 1, 2, 3), "heads": 6, "kv_heads": 2, "rope_dims": 4, "rope_base": 10_000.0, "rope_train_len": 6,
        "bigram": True, "trigram": "table", "smear": True, "xsa": 2, "value_residual": True, "value_residual_first": True,
        "value_embed_layers": (1, 3), "gate": "linear", "layer_scale": True, "softcap": 12.0, "slope": 0.2,
    },
    "gradients": ("trigram.embed.weight", "ve_shared.proj.weight", "blocks.0.attn.vr_lambda", "blocks.3.attn.c_k.weight", "smear.gate"),
}  # fmt: skip
# Depth recurrence of one layer, gated skips over an odd number of steps, parallel branches late, XORed trigrams, no layer scale.
LOOPED = {
    "recipe": "pr2005",
    "config": {
        "model.num_layers": 3, "model.num_heads": 3, "model.num_kv_heads": 3, "model.mlp_ratio": 2.5, "model.rope_dims": 0,
        "model.rope_bf16_frequencies": False, "model.loop_start": 1, "model.loop_end": 1, "model.loop_repeats": 2,
        "model.parallel_from": 2, "model.bigram_buckets": 11, "model.bigram_dim": 4, "model.trigram": "shared", "model.xsa_last_n": 1,
        "model.layer_scale": False, "model.mlp_slope": 0.0, "model.rope_base": 500.0,
    },
    "variant": {
        "layers": 3, "order": (0, 1, 1, 1, 2), "heads": 3, "kv_heads": 3, "rope_dims": 8, "rope_base": 500.0, "rope_train_len": 0,
        "bigram": True, "trigram": "shared", "xsa": 1, "gate": "query_rows", "skip": "gated", "parallel_from": 2, "softcap": 30.0,
        "slope": 0.0,
    },
    "gradients": ("bigram.embed.weight", "skip_gates", "blocks.1.attn.c_q.weight", "blocks.2.mlp.proj.weight", "tok_emb.weight"),
}  # fmt: skip
SHAPES = {  # outside the blocks, then inside: written out, so that the program's table of parameters is checked, too
    "hashed": {
        "skip_weights": (2, WIDTH), "tok_emb.weight": (VOCAB, WIDTH), "bigram.scale": (), "bigram.embed.weight": (17, 5),
        "bigram.proj.weight": (WIDTH, 5), "trigram.scale": (), "trigram.embed.weight": (13, 7), "trigram.proj.weight": (WIDTH, 7),
        "smear.gate": (WIDTH,), "ve_shared.scale": (), "ve_shared.embed.weight": (VOCAB, 6), "ve_shared.proj.weight": (8, 6),
        "ve_layer_scales.0": (1,), "ve_layer_scales.1": (1,),
        "block": {
            "attn.q_gain": (6,), "attn.vr_lambda": (2,), "attn.c_q.weight": (WIDTH, WIDTH), "attn.c_k.weight": (8, WIDTH),
            "attn.c_v.weight": (8, WIDTH), "attn.attn_gate.weight": (6, WIDTH), "attn.attn_gate.bias": (6,), "mlp.fc.weight": (36, WIDTH),
            "mlp.proj.weight": (WIDTH, 36),
        },
    },
    "looped": {
        "skip_weights": (2, WIDTH), "skip_gates": (2, WIDTH), "tok_emb.weight": (VOCAB, WIDTH), "bigram.scale": (),
        "bigram.embed.weight": (11, 4), "bigram.proj.weight": (WIDTH, 4),
        "block": {
            "attn.q_gain": (3,), "attn.c_q.weight": (WIDTH + 3, WIDTH), "attn.c_k.weight": (WIDTH, WIDTH),
            "attn.c_v.weight": (WIDTH, WIDTH), "mlp.fc.weight": (60, WIDTH), "mlp.proj.weight": (WIDTH, 60),
        },
    },
}  # fmt: skip
COMMON = {"attn_scale": (WIDTH,), "mlp_scale": (WIDTH,), "resid_mix": (2, WIDTH), "attn.proj.weight": (WIDTH, WIDTH)}


def bar(measure, value):
    return {"measure": measure, "value": value}


@pytest.fixture(scope="module", params=some(["hashed", "looped"], "looped"))
def made(request, tmp_path_factory):
    """A portable set: forward pass, gradients at points, sums of a standard evaluation."""
    about, shapes = (HASHED if request.param == "hashed" else LOOPED), dict(SHAPES[request.param])
    rng, variant = np.random.default_rng(7), about["variant"]
    per_block = shapes.pop("block") | COMMON
    shapes |= {f"blocks.{i}.{n}": shape for i in range(variant["layers"]) for n, shape in per_block.items()}
    p = {n: np.asarray(rng.normal(size=s) * (s[-1] if len(s) > 1 else 4) ** -0.5 + (len(s) < 2)) for n, s in shapes.items()}
    p = {n: x.astype(np.float32).astype(np.float64) for n, x in p.items()}
    tokens, stream = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)), rng.integers(2, VOCAB, 4 * LENGTH + 1)
    logits, nll = np.array([numpy_forward.logits(p, variant, row[:-1]) for row in tokens]), numpy_forward.nll(p, variant, tokens)
    arrays = {f"params/main/{n}": x.astype(np.float32) for n, x in p.items()}
    arrays |= {"model/main/tokens": tokens, "model/main/logits": logits, "model/main/nll": nll, "model/main/loss": nll.mean()}
    arrays["model/main/layer_order"] = np.array(variant["order"])
    for name in about["gradients"]:
        points = np.stack([rng.integers(0, n, 6) for n in p[name].shape], 1)
        key = name.replace(".", "_")
        arrays[f"grads/main/index/{key}"] = points
        arrays[f"grads/main/grad/{name}@{key}"] = numpy_forward.slopes(p, variant, tokens, name, points)
    scored = numpy_forward.nll(p, variant, np.stack([stream[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(4)]))
    lengths = rng.integers(1, 6, VOCAB)
    arrays |= {"eval/standard/tokens": stream, "eval/standard/base_bytes": lengths, "eval/standard/leading_space": np.zeros(VOCAB, bool)}
    arrays |= {"eval/standard/boundary": np.arange(VOCAB) < 2, "eval/standard/nats": scored.sum(), "eval/standard/nll": scored.ravel()}
    arrays |= {"eval/standard/count": np.int64(scored.size), "eval/standard/bytes": lengths[stream[1:]].sum()}
    tolerances = {
        "model": {"logits": bar("abs", 1e-4), "nll": bar("abs", 1e-4), "loss": bar("abs", 1e-5), "layer_order": bar("equal", 0)},
        "grads": {"grad": bar("rel L2", 1e-3)},
        "eval": {"nats": bar("rel", 1e-5), "nll": bar("abs", 1e-4), "count": bar("equal", 0), "bytes": bar("equal", 0)},
    }
    cases = {"params": {"main": {}}, "model": {"main": {}}, "grads": {"main": {"inputs": "model/main"}}}
    cases["eval"] = {"standard": {"mode": "standard"}}
    shape = {"model.vocab_size": VOCAB, "model.width": WIDTH, "data.seq_len": LENGTH, "eval.stride": 3, "numerics": "fp32"}
    document = {
        "format": 1, "recipe": about["recipe"], "made": {"from": "tests/interop/numpy_forward.py"}, "hyperparameters": {},
        "config": shape | about["config"],
        "sections": {s: {"cases": c, "tolerances": tolerances.get(s, {})} for s, c in cases.items()},
    }  # fmt: skip
    path = tmp_path_factory.mktemp(request.param) / "set.npz"
    narrow = {k: x.astype(np.float32) if x.dtype == np.float64 and not k.endswith("nats") else x for k, x in arrays.items()}
    np.savez_compressed(path, reference=json.dumps(document), **narrow)
    return path


def test_the_set_conforms(made):
    assert problems(made) == []


def missed(report):
    assert not report.not_checked and report.compared == report.held
    return [f"{r.name}: {r.worst} {r.max_abs} {r.max_rel}" for r in report.results if not r.ok]


def test_the_forward_pass_is_met(made):
    report = reproduce.reproduce(made, "model")
    assert missed(report) == [] and report.held == 4


@pytest.mark.slow
def test_the_set_is_met_item_by_item(made):
    report = reproduce.reproduce(made)
    assert missed(report) == [] and report.held == 4 + 5 + 4


def test_a_switched_technique_is_a_miss(made, tmp_path):
    """Any technique left out moves the logits: the set would not be met by a program without it."""
    arrays = dict(np.load(made))
    document = json.loads(str(arrays["reference"]))
    key = "model.xsa_last_n"
    document["config"][key] -= 1
    np.savez(tmp_path / "set.npz", **(arrays | {"reference": np.array(json.dumps(document))}))
    report = reproduce.reproduce(tmp_path / "set.npz", "model")
    assert any(r.name == "model/main: logits" and not r.ok for r in report.results)

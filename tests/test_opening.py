"""Models opened on a machine other than the one that made them."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_recipes import tiny

from golf_jax import opening
from golf_jax.config import GolfError
from golf_jax.kernels.native import library
from golf_jax.model import leaves
from golf_jax.opening import opened_here, with_attention


@pytest.mark.parametrize("attention", ["auto", "xla", "native", "pallas", "cudnn"])
def test_an_attention_backend_that_is_not_here_is_exchanged_aloud(attention, capsys, monkeypatch):
    def load():
        raise ValueError("c++ cannot be run")

    monkeypatch.setattr(library, "load", load)
    config = replace(tiny("baseline").model, attention=attention)
    model = opened_here(config, {name: np.zeros(leaf.shape, np.float32) for name, leaf in leaves(config).items()}, name="a.golf")
    said = capsys.readouterr().err
    assert model.config.attention == "xla"
    told = f"a.golf: made with attention {attention}; xla computes it on this cpu (model.attention"
    assert not said if attention in ("auto", "xla") else said.startswith(told)


def machine(has):
    """Stands in for `resolve` on a machine that has these (attention, MLP) pairs, the first by `auto`."""

    def resolve(config, platform, **_):
        for attention, mlp in has:
            if config.attention in ("auto", attention) and config.mlp in ("auto", mlp):
                return replace(config, attention=attention, mlp=mlp, dtype="float32")
        raise GolfError(f"{config.attention} with {config.mlp} does not run")

    return resolve


@pytest.mark.parametrize(
    ("made", "has", "now", "said"),
    [
        (("pallas", "pallas"), [("pallas", "xla"), ("xla", "xla")], ("pallas", "xla"), "made with mlp pallas; xla computes it"),
        (("pallas", "xla"), [("cudnn", "pallas"), ("cudnn", "xla")], ("cudnn", "xla"), "made with attention pallas; cudnn computes it"),
        (("pallas", "pallas"), [("xla", "xla")], ("xla", "xla"), "made with attention pallas and mlp pallas; xla computes it"),
        (("pallas", "pallas"), [("cudnn", "xla")], ("cudnn", "xla"), "attention pallas and mlp pallas; cudnn and xla compute it"),
        (("pallas", "xla"), [("pallas", "pallas"), ("pallas", "xla")], ("pallas", "xla"), ""),
    ],
)
def test_only_what_is_lacking_is_exchanged_and_named(made, has, now, said, capsys, monkeypatch):
    monkeypatch.setattr(opening, "resolve", machine(has))
    config = replace(tiny("baseline").model, attention=made[0], mlp=made[1])
    here = opening._exchanged(config, (("mlp",), ("attention",), ("attention", "mlp")), "a.golf")
    here = opening.resolve(here, "cpu")
    assert (here.attention, here.mlp) == now and said in capsys.readouterr().err
    assert said or not capsys.readouterr().err


@pytest.mark.parametrize(
    ("made", "asked", "now", "said"),
    [
        (("xla", "xla"), "pallas", ("pallas", "xla"), ""),  # the MLP by name stays
        (("cudnn", "auto"), "pallas", ("pallas", "pallas"), ""),  # `auto` is chosen anew
        (("pallas", "pallas"), "xla", ("xla", "xla"), "made with mlp pallas; xla computes it"),
    ],
)
def test_another_attention_leaves_the_mlp_alone_where_it_can(made, asked, now, said, capsys, monkeypatch):
    monkeypatch.setattr(opening, "resolve", machine([("pallas", "pallas"), ("pallas", "xla"), ("cudnn", "xla"), ("xla", "xla")]))
    config = replace(tiny("baseline").model, attention=made[0], mlp=made[1])
    model = with_attention(opening.Model(config, {}, asked=config, name="a.golf"), asked)
    assert (model.config.attention, model.config.mlp) == now and model.asked.mlp == made[1]
    assert (said in (told := capsys.readouterr().err)) and bool(told) == bool(said)
    with pytest.raises(GolfError, match="native with .* does not run"):
        with_attention(model, "native")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_its_file_tensor_and_layer(value):
    config = tiny("baseline").model
    params = {name: np.zeros(leaf.shape, np.float32) for name, leaf in leaves(config).items()}
    params["q"][1, 0, 0] = value
    with pytest.raises(GolfError, match=r"^a.pt: model: 1 of \d+ values of 'q' are not finite, in blocks.1.attn.c_q.weight first"):
        opened_here(config, params, name="a.pt")

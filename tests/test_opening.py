"""Models opened on a machine other than the one that made them."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_recipes import tiny

from golf_jax.config import GolfError
from golf_jax.kernels.attention import native
from golf_jax.model import leaves
from golf_jax.opening import opened_here


@pytest.mark.parametrize("attention", ["auto", "xla", "native", "pallas", "cudnn"])
def test_an_attention_backend_that_is_not_here_is_exchanged_aloud(attention, capsys, monkeypatch):
    def load():
        raise ValueError("c++ cannot be run")

    monkeypatch.setattr(native, "load", load)
    config = replace(tiny("baseline").model, attention=attention)
    model = opened_here(config, {name: np.zeros(leaf.shape, np.float32) for name, leaf in leaves(config).items()}, name="a.golf")
    said = capsys.readouterr().err
    assert model.config.attention == "xla"
    told = f"a.golf: made with attention {attention}; xla computes it on this cpu (model.attention"
    assert not said if attention in ("auto", "xla") else said.startswith(told)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_its_file_tensor_and_layer(value):
    config = tiny("baseline").model
    params = {name: np.zeros(leaf.shape, np.float32) for name, leaf in leaves(config).items()}
    params["q"][1, 0, 0] = value
    with pytest.raises(GolfError, match=r"^a.pt: model: 1 of \d+ values of 'q' are not finite, in blocks.1.attn.c_q.weight first"):
        opened_here(config, params, name="a.pt")

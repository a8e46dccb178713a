"""from_torch / to_torch: every tensor used once, what does not fit is named, hyperparameters in any of the PRs' spellings."""

import numpy as np
import pytest

from golf_jax.artifact.model import tensor_shapes
from golf_jax.config import GolfError, load_recipe, recipe_names
from golf_jax.interop import from_torch, model_config, to_torch
from golf_jax.interop.hparams import RECIPES
from golf_jax.interop.reference import Set
from golf_jax.interop.safetensors import read_safetensors, write_safetensors
from golf_jax.interop.torch_names import guess_recipe, open_torch, pr_names
from golf_jax.model.params import count, to_tensors


def load(references, recipe):
    """Hyperparameters and state_dict as the PR's script has them."""
    refs = Set(references / f"{recipe}.npz")
    case = refs.case("params/main")
    return refs.json["hyperparameters"], pr_names(recipe, case.model, case.own)


@pytest.mark.parametrize("recipe", RECIPES)
def test_round_trip_keeps_every_tensor(references, recipe):
    settings, state = load(references, recipe)
    config, params = from_torch(recipe, settings, state)
    back = to_torch(recipe, config, params)
    assert set(back) == set(state)
    for name, want in state.items():
        np.testing.assert_array_equal(back[name], want, err_msg=name)
        assert back[name].shape == want.shape, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_missing_an_unknown_and_a_misshaped_tensor_are_named(references, recipe):
    settings, state = load(references, recipe)
    name = "blocks.3.attn_scale"
    for broken, message in (
        ({k: v for k, v in state.items() if k != name}, f"missing.*{name}"),
        (state | {"blocks.3.attn.extra": state[name]}, "unknown.*blocks.3.attn.extra"),
        (state | {name: state[name][:-1]}, f"{name} has shape"),
    ):
        with pytest.raises(GolfError, match=message):
            from_torch(recipe, settings, broken)


def test_banks_may_come_split(references):
    settings, state = load(references, "pr1182")
    config, params = from_torch("pr1182", settings, state)
    _, again = from_torch("pr1182", settings, to_tensors(config, params))
    assert all(np.array_equal(params[k], again[k]) for k in params)
    short = state | {"qo_bank": state["qo_bank"][:-1]}
    with pytest.raises(GolfError, match=r"qo_bank: shape \(21"):
        from_torch("pr1182", settings, short)


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("pr372", 26_666_073), ("pr562", 24_509_621), ("pr638", 27_137_223), ("pr1182", 27_108_468), ("pr2005", 35_989_592)],
)
def test_absent_settings_are_the_prs(recipe, parameters):
    assert count(model_config(recipe, {})) == parameters


def test_spellings_of_settings():
    assert model_config("pr372", {"MODEL_DIM": "96", "GOLDEN_NUMEL": 7}).fake_quant.min_numel == 7
    nested = model_config("pr638", {"model_dim": 64, "num_heads": "4", "env": {"MODEL_DIM": "96", "LEAKY_RELU": "0"}})
    assert nested.width == 96 and nested.mlp_slope == 0
    assert model_config("pr1182", {"VE_LAYERS": "1,2", "NUM_LAYERS": "4"}).value_embed_layers == (1, 2)
    assert model_config("pr1182", {"ve_layers": [1, 2], "xsa_last_n": 99}).xsa_last_n == 11
    assert model_config("pr562", {"trigram": False}).trigram == "off"


@pytest.mark.parametrize(
    ("recipe", "settings", "named"),
    [
        ("pr372", {"value_residual": True}, "value_residual"),
        ("pr1182", {"gated_attention": True}, "gated_attention"),
        ("pr1182", {"MTP_NUM_HEADS": "2"}, "mtp_num_heads"),
        ("pr2005", {"gated_attn": "elementwise"}, "elementwise"),
        ("pr2005", {"value_residual_alpha": 0.5}, "value_residual_alpha"),
        ("pr638", {"tie_embeddings": False}, "tie_embeddings"),
        ("pr2005", {"embedding_dim": 64}, "embedding_dim"),
        ("pr562", {"num_layers": "ten"}, "num_layers"),
        ("pr9", {}, "pr9"),
    ],
)
def test_parts_that_do_not_exist_here_are_refused_by_name(recipe, settings, named):
    with pytest.raises(GolfError, match=named):
        model_config(recipe, settings)


def test_switched_off_parts_are_no_part():
    assert model_config("pr372", {"value_residual": 0, "mtp_num_heads": "0", "normuon": "False"}).width == 512


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_recipe_is_told_by_names_and_shapes(recipe):
    shapes = tensor_shapes(load_recipe(recipe).model)
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    same = ["pr2135", "pr2135_legal"] if recipe.startswith("pr2135") else [recipe]
    assert guess_recipe(tensors, "x.pt") == same
    with pytest.raises(GolfError, match=f"nearest is {same[0]}.*tok_emb.weight"):
        guess_recipe(tensors | {"tok_emb.weight": np.zeros((3, 3), np.float32)}, "x.pt")


def test_parts_that_wrappers_put_into_names_are_left_out_and_others_are_told(tmp_path):
    shapes = tensor_shapes(load_recipe("baseline").model)
    tensors = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}

    def opened(*names, recipe=""):
        write_safetensors({n: x for name in names for n, x in {name(n): x for n, x in tensors.items()}.items()}, tmp_path / "x.safetensors")
        return open_torch(tmp_path / "x.safetensors", recipe, lambda line: None)[2]

    assert opened(lambda n: f"model.{n}") == "baseline"
    fsdp = lambda n: "_fsdp_wrapped_module._orig_mod." + n.replace("blocks.3.", "blocks.3._checkpoint_wrapped_module.module.")  # noqa: E731
    assert opened(fsdp) == "baseline"
    with pytest.raises(GolfError, match="without the wrappers' module several tensors have the same name"):
        opened(lambda n: n, lambda n: f"module.{n}")
    for prefix, recipe in (("net.", ""), (300 * "x" + ".", ""), (300 * "x" + ".", "baseline")):
        with pytest.raises(GolfError, match=prefix[:60].replace(".", r"\.")) as caught:
            opened(lambda n, prefix=prefix: prefix + n, recipe=recipe)
        assert len(str(caught.value)) < 900 and "\n" not in str(caught.value)


def test_safetensors_round_trip_and_damage(references, tmp_path):
    _, state = load(references, "pr1182")
    path = tmp_path / "model.safetensors"
    write_safetensors(state, path)
    back = read_safetensors(path)
    assert set(back) == set(state) and all(np.array_equal(back[k], state[k]) for k in state)
    data = path.read_bytes()
    for damaged in (data[:-1], data + b"x", b"", b"\xff" * 40):
        path.write_bytes(damaged)
        with pytest.raises(GolfError, match="model.safetensors"):
            read_safetensors(path)
    for number in (b"4.0", b'"4"', b"true"):
        header = b'{"w": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 16]}}' % number
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        with pytest.raises(GolfError, match="model.safetensors: damaged safetensors header"):
            read_safetensors(path)

"""Rules find their tensors in models of any size, and what cannot be packed is told before anything is trained."""

from dataclasses import replace

import pytest

from golf_jax.artifact.model import check_packing, scheme_packed, tensor_shapes
from golf_jax.config import GolfError, QuantConfig, QuantRule, Recipe, load_recipe, recipe_names
from golf_jax.quant import rules_for
from golf_jax.quant.rules import count_layers, match_rule


def shrunk(name: str, **model) -> Recipe:
    recipe = load_recipe(name)
    return replace(recipe, model=replace(recipe.model, **model))


def scheme(recipe: Recipe, tensor: str) -> str:
    shapes = tensor_shapes(recipe.model)
    return match_rule(rules_for(recipe.model, recipe.quant), tensor, 10**6, count_layers(shapes)).scheme


def test_rules_count_layers_from_the_end():
    rules = QuantConfig(rules=(QuantRule("blocks.-1.attn|blocks.-10.mlp", "float16"), QuantRule("", "int6_row")))
    found = {n: match_rule(rules, n, 9, 11).scheme for n in ("blocks.10.attn.q", "blocks.1.attn.q", "blocks.1.mlp.fc", "blocks.10.mlp.fc")}
    assert list(found.values()) == ["float16", "int6_row", "float16", "int6_row"]


@pytest.mark.parametrize(("name", "kept"), [("pr372", 8), ("pr562", 7)])
def test_the_exempt_key_matrix_goes_with_the_number_of_layers(name, kept):
    recipe = shrunk(name, num_layers=9)
    assert [i for i in range(9) if scheme(recipe, f"blocks.{i}.attn.c_k.weight") == "float16"] == [kept]


def test_what_fake_quantization_exempts_is_stored_as_floats():
    model = load_recipe("pr372").model
    recipe = shrunk("pr372", fake_quant=replace(model.fake_quant, late_k_layers=2))
    assert [i for i in range(11) if scheme(recipe, f"blocks.{i}.attn.c_k.weight") == "float16"] == [9, 10]


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("change", [{}, {"num_layers": 9, "value_embed_layers": ()}, {"width": 128, "num_heads": 4, "num_kv_heads": 2},
                                    {"bigram_buckets": 0, "trigram": "off", "trigram_buckets": 0, "smear_gate": False}])  # fmt: skip
def test_shipped_recipes_can_be_packed_at_other_sizes(name, change):
    check_packing(shrunk(name, **change))


SMALL, REST = QuantRule("", "float16", max_numel=65_536), QuantRule("", "int6_row")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": (SMALL, QuantRule("", "int6_rows"))}, "unknown scheme 'int6_rows'"),
        (
            {"rules": (SMALL, QuantRule("blocks.11.attn", "float16"), REST)},
            "'blocks.11.attn' is in the name of no tensor",
        ),
        ({"rules": (SMALL, QuantRule("mpl", "float16"), REST)}, "'mpl' is in the name of no tensor"),
        ({"rules": (SMALL,)}, "no rule matches tok_emb.weight"),
        ({"rules": (REST,)}, "needs a matrix"),
        ({"rules": (SMALL, QuantRule("", "gptq_int6"))}, "quant.gptq_batches is 0, but scheme gptq_int6 needs Hessians"),
        ({"gptq_batches": 4}, "quant.gptq_batches is 4, but no scheme in quant.rules needs Hessians"),
        ({"rules": (SMALL, QuantRule("", "gptq_int6")), "gptq_batches": 4}, "none is collected for bigram.embed.weight"),
        ({"compressor": "gzip"}, "quant.compressor: unknown 'gzip'"),
        ({"compressor": "lzma", "level": 10}, "quant.level: lzma has levels 0 to 9, got 10"),
        ({"level": 0}, "quant.level: zstd has levels 1 to 22, got 0"),
    ],
)
def test_what_cannot_be_packed_is_refused(change, message):
    recipe = load_recipe("pr372")
    with pytest.raises(GolfError, match=message):
        check_packing(replace(recipe, quant=replace(recipe.quant, **change)))


def test_impossible_numbers_are_refused():
    for make in (lambda: QuantRule("", "int6_row", step=float("nan")), lambda: QuantRule("", "int6_row", step=float("inf")),
                 lambda: QuantRule("", "int6_row", min_numel=-1), lambda: QuantConfig(prune_min_numel=-1)):  # fmt: skip
        with pytest.raises(GolfError, match=r"quant\."):
            make()


@pytest.mark.parametrize("name", recipe_names())
def test_a_record_is_named_by_its_last_rule(name):
    recipe = load_recipe(name)
    assert scheme_packed(recipe.model, recipe.quant) == recipe.quant.rules[-1].scheme


@pytest.mark.parametrize(("width", "vocab", "named"), [(32, 64, "float16"), (32, 8192, "gptq_int7"), (512, 64, "gptq_int6")])
def test_a_shrunk_record_is_named_by_what_is_packed(width, vocab, named):
    """All matrices below the size limit of the first rule, all but the embedding, none."""
    recipe = shrunk("pr2005", width=width, num_heads=4, num_kv_heads=2, rope_dims=4, vocab_size=vocab)
    assert scheme_packed(recipe.model, recipe.quant) == named

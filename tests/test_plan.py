"""Contradictions are told in one line, before a run directory exists and before anything is compiled."""

import math
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny_recipes import build_text, on_text, tiny

from golf_jax import pipeline
from golf_jax.config import GolfError, QuantRule, Recipe
from golf_jax.pipeline import Options


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return build_text(tmp_path_factory.mktemp("text") / "data")


def alter(config: Any, field: str, value: Any) -> Any:
    """`config` with the field at a dotted path replaced; numbers index tuples."""
    name, _, rest = field.partition(".")
    if is_dataclass(config):
        return replace(config, **{name: alter(getattr(config, name), rest, value) if rest else value})
    items = list(config)
    items[int(name)] = alter(items[int(name)], rest, value) if rest else value
    return tuple(items)


NAN, INF = math.nan, math.inf
RULE, ANY = QuantRule("", "float16", max_numel=8), QuantRule("", "int6_row", max_numel=0)
CONTRADICTIONS: list[tuple[str, Any, str]] = [
    ("model.vocab_size", 512, "vocab_size"),
    ("model.width", 0, "width"),
    ("model.width", 34, "num_heads"),
    ("model.num_layers", -1, "num_layers"),
    ("model.num_layers", 100_000, "layers; at most 1024"),
    ("model.num_kv_heads", 3, "num_kv_heads"),
    ("model.mlp_ratio", 0.0, "mlp_ratio"),
    ("model.mlp_ratio", NAN, "mlp_ratio"),
    ("model.mlp_ratio", 1e308, "mlp_ratio"),
    ("model.mlp_ratio", -1e308, "mlp_ratio"),
    ("model.fake_quant.late_k_layers", 2**31, "late_k_layers"),
    ("model.softcap", 0.0, "softcap"),
    ("model.softcap", INF, "softcap"),
    ("model.softcap", 81.0, "model.softcap must be at most 80"),
    ("model.rope_base", -1.0, "rope_base"),
    ("model.rope_dims", 3, "rope_dims"),
    ("model.embed_init_std", -1.0, "embed_init_std"),
    ("model.q_gain_init", NAN, "q_gain_init"),
    ("model.value_embed_layers", (7,), "value_embed_layers"),
    ("model.loop_repeats", 2, "loop"),
    ("model.bf16_params", ("tok_embb",), "tok_embb"),
    ("model.attention", "cudnn", "choose auto or xla"),
    ("model.attention", "pallas", "choose auto or xla"),
    ("model.mlp", "pallas", "choose auto or xla"),
    ("data.train", "nowhere/*.bin", "nowhere"),
    ("data.tokenizer", "no.model", "no.model"),
    ("data.ranks", 3, "devices"),
    ("data.ranks", 10**9, "data.ranks must be at most 4,096"),
    ("eval.score_first.ranks", 10**9, "ranks must be at most 4,096"),
    ("data.seq_len", 0, "seq_len"),
    ("data.seq_len", 4096, "seq_len 4096"),
    ("data.rows_per_rank", 100_000, "holds"),
    ("optim.groups.0.lr", -1.0, "lr"),
    ("optim.groups.0.lr", NAN, "lr"),
    ("optim.groups.1.lr", INF, "lr"),
    ("optim.groups.0.weight_decay", -0.1, "weight_decay"),
    ("optim.groups.0.weight_decay", NAN, "weight_decay"),
    ("optim.groups.0.roles", ("matrix", "proj", "gate", "wings"), "wings"),
    ("optim.groups.0.roles", ("proj", "gate"), "matrix"),
    ("optim.clip_norm", -1.0, "clip_norm"),
    ("optim.clip_norm", NAN, "clip_norm"),
    ("schedule.ema_decay", 1.5, "ema_decay"),
    ("schedule.ema_decay", NAN, "ema_decay"),
    ("schedule.warmdown_frac", -0.1, "warmdown_frac"),
    ("schedule.warmdown_steps", -1, "warmdown_steps"),
    ("schedule.lr_floor", -0.5, "lr_floor"),
    ("schedule.loop_from", 2.0, "loop_from"),
    ("schedule.swa_every", -1, "swa_every"),
    ("schedule.export", "swa", "swa"),
    ("schedule.fake_quant_below", 0.5, "fake_quant"),
    ("budget.steps", -4, "steps"),
    ("budget.seconds", NAN, "seconds"),
    ("quant.rules", (RULE, QuantRule("", "int6_rows")), "int6_rows"),
    ("quant.rules", (RULE, QuantRule("no_such_tensor", "float16"), ANY), "no_such_tensor"),
    ("quant.rules", (RULE,), "no rule"),
    ("quant.rules", (QuantRule("", "int6_row"),), "matrix"),
    ("quant.rules", (RULE, QuantRule("", "gptq_int6")), "gptq_batches"),
    ("quant.level", 40, "level"),
    ("quant.compressor", "gzip", "gzip"),
    ("quant.prune_fraction", 1.0, "prune_fraction"),
    ("quant.gptq_batches", -1, "gptq_batches"),
    ("eval.batch_rows", -1, "batch_rows"),
    ("eval.every", -1, "eval.every"),
    ("micro_rows", -1, "micro_rows"),
    ("seed", 2**70, "is too large a number"),
    ("log_every", 0, "log_every"),
    ("checkpoint_every", -3, "checkpoint_every"),
]


@pytest.mark.parametrize(("field", "value", "word"), CONTRADICTIONS)
def test_a_contradiction_is_refused_before_anything_is_compiled(field, value, word, tmp_path, text, monkeypatch):
    monkeypatch.setattr(pipeline, "_stages", None)  # not reached
    compiled: list[str] = []
    listener = lambda name, *_, **__: compiled.append(name) if "compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    base = on_text(tiny("baseline", vocab_size=300, seq_len=32), text)
    try:
        with pytest.raises(GolfError) as caught:
            pipeline.run(alter(base, field, value), Options(run_dir=str(tmp_path / "run")))
    finally:
        jax._src.monitoring.unregister_event_duration_listener(listener)
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert not compiled and not (tmp_path / "run").exists()


def test_the_recipe_itself_is_possible(tmp_path, text, monkeypatch):
    monkeypatch.setattr(pipeline, "_stages", lambda *_: {"reached": True})
    recipe: Recipe = on_text(tiny("baseline", vocab_size=300, seq_len=32), text)
    assert pipeline.run(recipe, Options(run_dir=str(tmp_path / "run"))) == {"reached": True}


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"devices": 9}, "only 8 cpu"),
    ({"emulate_devices": 3}, "does not divide the 8"),
    ({"profile": -1}, "profile must not be negative"),
    ({"accept": ("seed",)}, "give --resume RUN, too"),
    ({"resume": "a"}, "leave --run-dir out"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_cannot_be_are_refused(options, message, tmp_path, text, monkeypatch):
    monkeypatch.setattr(pipeline, "_stages", None)
    with pytest.raises(GolfError, match=message):
        pipeline.run(on_text(tiny("baseline", vocab_size=300), text), Options(run_dir=str(tmp_path / "run"), **options))


def test_validation_files_among_the_training_shards_are_refused(tmp_path, text):
    recipe = on_text(tiny("baseline", vocab_size=300), text)
    recipe = replace(recipe, data=replace(recipe.data, train=str(text / "*.bin")))
    with pytest.raises(GolfError, match=r"data.train: .*val_000000.bin belongs to the validation set .*; narrow the glob"):
        pipeline.run(recipe, Options(run_dir=str(tmp_path / "run")))

"""Test-time training beside PyTorch: the sums of scores of both sides agree because both learn, and learn the same."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from golf_jax.config import DataConfig, load_recipe

pytest.importorskip("torch", reason="the peer needs PyTorch (pip install golf-jax[torch])")


@pytest.mark.slow
def test_both_sides_learn_the_same(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    benchmark = importlib.import_module("score_first")
    recipe = load_recipe("pr2005")
    small = dict(vocab_size=64, num_layers=4, width=32, num_heads=4, num_kv_heads=2, rope_dims=4, xsa_last_n=3, dtype="float32")
    model = replace(recipe.model, **small, loop_start=1, loop_end=1, parallel_from=3, attention="xla")
    recipe = replace(recipe, model=model, data=DataConfig(seq_len=64, ranks=2, rows_per_rank=2), numerics="fp32")
    options = benchmark.Options(peer=("eager",), devices=2, chunks=2, chunk_tokens=128)

    result = benchmark.measure(recipe, options)
    assert max(map(abs, result["difference"]["eager"])) < 1e-6
    assert result["windows_per_chunk"] == 2 and len(result["chunks"]["jax"]) == 2

    class Idle(benchmark.Peer):
        def __init__(self, job, plain):
            super().__init__(job | {"sgd": job["sgd"] | {"lr": 0.0}}, plain)

    monkeypatch.setattr(benchmark, "Peer", Idle)
    scored_alike, *others = map(abs, benchmark.measure(recipe, options)["difference"]["eager"])
    assert scored_alike < 1e-6 < 1e-5 < min(others)

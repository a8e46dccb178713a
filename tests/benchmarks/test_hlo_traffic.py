"""Bytes counted from a compiled program's text."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "hlo_traffic.py"


@pytest.fixture(scope="module")
def hlo():
    spec = importlib.util.spec_from_file_location("hlo_traffic", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counted(hlo, fn, *shapes):
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return hlo.traffic(jax.jit(fn).lower(*arguments).compile().as_text())


def test_shapes_have_bytes(hlo):
    assert hlo.array_bytes("(f32[8,2]{1,0}, bf16[3]{0}, pred[])") == 64 + 6 + 1


def test_a_product_reads_two_matrices_and_writes_one(hlo):
    assert counted(hlo, lambda a, b: a @ b, (256, 512), (512, 128)) == {"matrix products": 4 * (256 * 512 + 512 * 128 + 256 * 128)}


def test_an_elementwise_chain_is_one_pass(hlo):
    assert counted(hlo, lambda x: jnp.exp(x) * 2 + x, (1024, 64)) == {"elementwise and reductions": 2 * 4 * 1024 * 64}


def test_what_a_fusion_takes_of_an_operand_counts(hlo):
    found = counted(hlo, lambda x: jnp.exp(x[:, :16]) + jnp.exp(x[:, 16:32]), (1024, 64))
    assert sum(found.values()) == 3 * 4 * 1024 * 16


def test_a_slice_counts_once_and_in_the_width_that_it_has_in_memory(hlo):
    text = """HloModule m

%fused (p: bf16[8,4]) -> f32[8,2] {
  %p = bf16[8,4]{1,0} parameter(0)
  %c = f32[8,4]{1,0} convert(%p)
  %a = f32[8,2]{1,0} slice(%c), slice={[0:8], [0:2]}
  %b = f32[8,2]{1,0} slice(%c), slice={[0:8], [0:2]}
  ROOT %m = f32[8,2]{1,0} multiply(%a, %b)
}

ENTRY %main (x: bf16[8,4]) -> f32[8,2] {
  %x = bf16[8,4]{1,0} parameter(0)
  ROOT %f = f32[8,2]{1,0} fusion(%x), kind=kLoop, calls=%fused
}
"""
    assert hlo.traffic(text) == {"elementwise and reductions": 8 * 2 * 2 + 8 * 2 * 4}


def test_a_loop_counts_as_often_as_it_runs(hlo):
    def loop(x):  # with more in its carry than HLO writes without numbering it
        def body(carry, _):
            c, *rest = carry
            return (jnp.sin(c) @ c, *rest[1:], rest[0]), None

        return jax.lax.scan(body, (x, *(x[0] + i for i in range(6))), None, length=7)[0]

    once, seven = counted(hlo, lambda x: jnp.sin(x) @ x, (128, 128)), counted(hlo, loop, (128, 128))
    assert seven["matrix products"] == 7 * once["matrix products"]

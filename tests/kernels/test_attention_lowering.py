"""Lowering for GPU and TPU without one, and (slow) full compilation for Hopper: what was asked for is in the program."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from golf_jax.kernels.attention import assert_backend, xsa_attention

ROOT = Path(__file__).resolve().parents[2]
GPU = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
TPU = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason='needs the CUDA wheels: pip install "jax[cuda13]"'
)


def lowered_text(backend, device, *, head_dim=64, T=256, xsa=True, documents=False, factors=False):
    """Forward and gradients, lowered for the platform of a device that is not here."""
    q = jax.ShapeDtypeStruct((2, T, 4, head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, T, 2, head_dim), jnp.bfloat16)
    first = jax.ShapeDtypeStruct((2, T), jnp.int32) if documents else None

    given = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in (q.shape[2:3], *(x.shape[:3] for x in (q, kv, kv)))) if factors else None

    def total(q, k, v, factors, first):
        return jnp.sum(xsa_attention(q, k, v, xsa=xsa, first_BS=first, factors=factors, backend=backend).astype(jnp.float32))

    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    platform = {"gpu": "cuda"}.get(device.platform, device.platform)
    # cuDNN's partitioning rule does not lower under an abstract mesh; only `pallas` needs to be told the platform.
    with jax.sharding.use_abstract_mesh(mesh) if backend != "cudnn" else contextlib.nullcontext():
        return (
            jax.jit(jax.value_and_grad(total, (0, 1, 2, 3))).trace(q, kv, kv, given, first).lower(lowering_platforms=(platform,)).as_text()
        )


@pytest.mark.parametrize(
    ("head_dim", "T", "xsa", "documents", "factors"),
    [
        (64, 256, True, False, True),
        (64, 1000, False, False, False),
        (32, 128, True, False, False),
        (128, 512, True, False, True),
        (64, 1000, True, True, True),
    ],
)
def test_mosaic_kernels_lower_for_cuda(head_dim, T, xsa, documents, factors):
    text = lowered_text("pallas", GPU, head_dim=head_dim, T=T, xsa=xsa, documents=documents, factors=factors)
    assert_backend(text, "pallas")
    for kernel in ("xsa_attention_forward", "xsa_attention_dq", "xsa_attention_dkv"):
        assert kernel in text


@pytest.mark.parametrize(("xsa", "documents"), [(True, False), (False, False), (True, True)])
def test_splash_lowers_for_tpu(xsa, documents):
    text = lowered_text("pallas", TPU, xsa=xsa, documents=documents)
    assert_backend(text, "pallas")
    assert text.count("tpu_custom_call") >= 3  # forward, dkv, dq


@pytest.mark.parametrize("device", [GPU, TPU], ids=["cuda", "tpu"])
def test_reference_lowers_everywhere(device):
    assert_backend(lowered_text("xla", device), "xla")


CUDNN = """
import sys, jax
sys.path[:0] = [{root!r}, {here!r}]
import test_attention_lowering as lowering
text = lowering.lowered_text("cudnn", lowering.GPU)
lowering.assert_backend(text, "cudnn")
assert "fmhaSoftmaxBackward" in text
"""


@needs_plugin
def test_cudnn_lowers_for_cuda():
    # In its own process: the CUDA plugin registers itself only where jax starts with it in sight.
    code = CUDNN.format(root=str(ROOT), here=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("devices", [1, 8])
def test_kernels_compile_for_hopper_without_spills(tmp_path, devices):
    report = tmp_path / "report.json"
    command = [sys.executable, ROOT / "benchmarks/aot_compile.py", "--what", "kernels", "--devices", str(devices), "--json", report]
    subprocess.run(command, check=True)
    programs = {p["name"]: p for p in json.loads(report.read_text())["programs"]}
    both = programs["pallas attention, xsa: forward and backward"]
    assert [k["kernel"] for k in both["kernels"]] == ["xsa_attention_forward", "xsa_attention_dq", "xsa_attention_dkv"]
    assert all(k["spill_store_bytes"] == k["spill_load_bytes"] == 0 for p in programs.values() for k in p["kernels"])
    mlp = programs["pallas MLP, 1536 hidden units: forward and backward"]
    assert {k["kernel"] for k in mlp["kernels"]} == {"mlp_forward", "mlp_backward_u", "mlp_backward_w"}
    assert max(max(p["shared_memory_bytes"]) for p in programs.values() if p["shared_memory_bytes"]) <= 232448
    assert both["temporary_bytes"] < 130e6  # do in bf16 and the row statistics, per device
    assert sum("documents" in name for name in programs) == 2
    for program in programs.values():
        expected = {"all-reduce"} if devices > 1 and "cross entropy" in program["name"] else set()
        assert set(program["collectives"]) == expected

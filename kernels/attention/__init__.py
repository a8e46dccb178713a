"""XSA attention: causal grouped-query attention, optionally with the exclusive-self-attention epilogue.

One operation, `xsa_attention`, and four backends. What is asked for is what runs, or an error:
- `xla`     the reference (`reference.py`): any platform, any shape, also a suffix of the queries.
- `native`  on a CPU, float32: C++ (`kernels/native`) that this machine's compiler builds when it is first needed; also a suffix.
- `pallas`  on NVIDIA Hopper our fused Mosaic GPU kernels (`mosaic_gpu.py`), bf16 or fp16; on a TPU the shipped splash
            attention followed by the XSA custom_vjp (`splash_tpu.py`).
- `cudnn`   cuDNN's fused attention through jax.nn.dot_product_attention, then the XSA custom_vjp (`cudnn.py`).

`pallas` is opaque to the SPMD partitioner: on more than one device call it inside `jax.shard_map(..., check_vma=False)`.
With `first_BS` attention stays inside the documents of a packed row, but in `cudnn`, which has segments in a private call of jax only.
Shapes: B batch, T positions, S query positions, H query heads, G kv heads, K head_dim.
"""

import jax

from golf_jax.kernels.attention import native
from golf_jax.kernels.attention.reference import causal_attention
from golf_jax.kernels.attention.xsa import exclude_self_value
from golf_jax.kernels.native import library

BACKENDS = ("xla", "native", "pallas", "cudnn")
SUFFIX = ("xla", "native")  # those that take the last queries of a row alone
_MARKERS = {"native": ("golf_xsa_",), "pallas": ("mosaic_gpu", "tpu_custom_call"), "cudnn": ("__cudnn$fmha",)}


def xsa_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    xsa: bool,
    first_BS: jax.Array | None = None,
    longest: int | None = None,
    gate_BSH: jax.Array | None = None,
    factors: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Causal attention with scale 1/sqrt(K), softmax in fp32; with `xsa` the part along the own value is removed.

    q [B,T,H,K], k and v [B,T,G,K] of one dtype, H a multiple of G (query head h reads kv head h // (H//G)); returns
    q's shape and dtype. With the backends of `SUFFIX` q may hold only the last S <= T positions. Differentiable (reverse).
    first (int32 [B,S]): the first key that each query sees, which is the start of the segment that it lies in. longest: no segment
    is longer (not checked); lets `xla` be linear in T, where the kernels find out for themselves.
    gate [B,S,H], with `pallas` only: each head's output is multiplied by its sigmoid before it is written.
    factors (gain [H], log_q [B,S,H], log_k, log_v [B,T,G]), where `has_factors`: each head's q is multiplied by its gain. The logarithms
    are not used but for their gradients, dq.q, dk.k and dv.v of each row: those of the logarithm of a factor that the caller has put in
    already.
    Raises ValueError for shapes, dtypes or platforms that the backend does not have.
    """
    _check(q_BTHK, k_BTGK, v_BTGK, first_BS, gate_BSH, backend)
    if factors is not None and not has_factors(backend):
        raise ValueError(f"factors are in the attention backends 'native' and, on a GPU, 'pallas' only, got some with {backend!r}")
    if backend == "xla":
        o = causal_attention(q_BTHK, k_BTGK, v_BTGK, first_BS, longest)
        last_v = v_BTGK[:, v_BTGK.shape[1] - q_BTHK.shape[1] :]
        return exclude_self_value(o, last_v) if xsa else o.astype(q_BTHK.dtype)
    if backend == "native":
        return native.xsa_attention(q_BTHK, k_BTGK, v_BTGK, xsa=xsa, first_BS=first_BS, factors=factors)
    if backend == "cudnn":
        from golf_jax.kernels.attention import cudnn

        return cudnn.xsa_attention(q_BTHK, k_BTGK, v_BTGK, xsa=xsa)
    from golf_jax.kernels.attention import pallas

    return pallas.xsa_attention(q_BTHK, k_BTGK, v_BTGK, xsa=xsa, first_BS=first_BS, gate_BSH=gate_BSH, factors=factors)


def has_factors(backend: str) -> bool:
    """Whether the backend takes `factors` here: `native`, and `pallas` on a GPU."""
    if backend != "pallas":
        return backend == "native"
    from golf_jax.kernels.attention import pallas

    return pallas.platform() in ("gpu", "cuda")


def _check(q, k, v, first, gate, backend):
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention needs q [B,T,H,K] and k, v [B,T,G,K]; got {q.shape}, {k.shape}, {v.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}: cast after RoPE and gains")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"{q.shape[1]} query positions but only {k.shape[1]} key positions")
    if q.shape[1] != k.shape[1] and backend not in SUFFIX:
        raise ValueError(f"attention backend {backend!r} needs as many queries as keys; a suffix of queries needs {' or '.join(SUFFIX)}")
    if first is not None and (first.shape != q.shape[:2] or first.dtype != jax.numpy.int32):
        raise ValueError(f"first must be int32 {q.shape[:2]} like the queries, got {first.dtype} {first.shape}")
    if gate is not None and (backend != "pallas" or gate.shape != q.shape[:3]):
        raise ValueError(f"gate must be {q.shape[:3]} and is in attention backend 'pallas' only, got {gate.shape} with {backend!r}")
    if first is not None and backend == "cudnn":
        raise ValueError("attention backend 'cudnn' cannot stay inside documents: use 'pallas' or 'xla'")


def supported_backends(platform: str, head_dim: int, dtype, *, documents: bool = False) -> tuple[str, ...]:
    """The backends that run on a platform ("cpu", "gpu" or "cuda", "tpu") for this head_dim and dtype, best first.

    documents: those that have the mask of `first_BS`.
    On a GPU the order is by safety, not by measurement: cuDNN is the shipped kernel, ours is checked only ahead of time.
    """
    name, half = jax.numpy.dtype(dtype).name, jax.numpy.dtype(dtype).itemsize == 2
    if platform == "cpu":
        if name != "float32" or head_dim % 16 or not library.compiler():
            return ("xla",)
        return ("native", "xla") if library.MEASURED else ("xla", "native")
    if platform == "tpu":
        return ("pallas", "xla") if name in ("bfloat16", "float32") and (head_dim == 64 or head_dim % 128 == 0) else ("xla",)
    if platform in ("gpu", "cuda"):
        cudnn = ("cudnn",) if half and not documents and head_dim % 8 == 0 and head_dim <= 256 else ()
        mosaic = ("pallas",) if half and head_dim in (32, 64, 128) else ()
        return (*cudnn, *mosaic, "xla")
    raise ValueError(f"unknown platform {platform!r}: expected cpu, gpu, cuda or tpu")


def begin(backend: str) -> None:
    """Let a compiler begin with what `prepare` waits for, which must be called before anything that uses the backend is compiled."""
    if backend == "native":
        library.begin()


def prepare(backend: str) -> None:
    """Have ready what the backend needs, before anything that uses it is compiled. Raises ValueError."""
    if backend == "native":
        library.load()


def assert_backend(hlo_text: str, backend: str) -> None:
    """Raise ValueError unless a lowered or compiled program's text shows exactly the attention backend asked for."""
    found = {name for name, markers in _MARKERS.items() if any(marker in hlo_text for marker in markers)}
    expected = set() if backend == "xla" else {backend}
    if backend not in BACKENDS or found != expected:
        raise ValueError(f"the compiled program was to use attention backend {backend!r} but shows {', '.join(sorted(found)) or 'xla'}")

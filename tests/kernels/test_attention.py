"""Every attention backend that runs on a CPU, natively or interpreted, against an independent float64 computation.

Also the promises of the API. The Mosaic GPU kernels run in the GPU interpreter (jax >= 0.11), splash as plain XLA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from golf_jax.kernels.attention import assert_backend, mosaic_gpu, native, splash_tpu, supported_backends, xsa_attention
from golf_jax.kernels.attention.xsa import exclude_self_value
from golf_jax.kernels.native import library

TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3, "float16": 1e-3}
IMPLEMENTATIONS = {
    "xla": functools.partial(xsa_attention, backend="xla"),
    "xla in blocks": functools.partial(xsa_attention, backend="xla", longest=161),
    "native": functools.partial(xsa_attention, backend="native"),
    "mosaic": functools.partial(mosaic_gpu.xsa_attention, interpret=True),
    "splash": functools.partial(splash_tpu.xsa_attention, interpret=True),
}
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="the GPU interpreter of Pallas works from jax 0.11 (Python 3.12) on"
)
needs_compiler = pytest.mark.skipif(not library.compiler(), reason="no C++ compiler on this machine")
ON_CPU = ["xla", pytest.param("native", marks=needs_compiler)]


def inputs(B, T, H, G, K, dtype="float32", zero_values=True, seed=0):
    """q, k, v and the cotangent of y, rounded to dtype, with two zero value vectors."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((B, T, heads, K)) for heads in (H, G, G, H)]
    if zero_values:
        arrays[2][0, 0, 0] = arrays[2][0, T // 2, G - 1] = 0
    return [jnp.asarray(a, dtype) for a in arrays]


def first_keys(B, T, borders):
    """First visible keys when a document starts at each border; row b of the batch has them b positions later."""
    position = np.arange(T)
    rows = [np.where(np.isin(position, [0, *(border + b for border in borders)]), position, 0) for b in range(B)]
    return jnp.asarray(np.maximum.accumulate(rows, axis=1), jnp.int32)


def attention_float64(q, k, v, xsa, first=None):
    """The definition in float64; `xsa` off is plain attention."""
    S, H, K = q.shape[1:]
    T, G = k.shape[1:3]
    kv_head = np.array([h // (H // G) for h in range(H)])
    k, v = k[:, :, kv_head], v[:, :, kv_head]
    logits = jnp.einsum("bshk,bthk->bhst", q, k) / np.sqrt(K)
    logits = jnp.where(np.arange(S)[:, None] + T - S >= np.arange(T)[None], logits, -jnp.inf)
    if first is not None:
        logits = jnp.where(np.asarray(first)[:, None, :, None] <= np.arange(T), logits, -jnp.inf)
    o = jnp.einsum("bhst,bthk->bshk", jax.nn.softmax(logits, -1), v)
    if xsa:
        own = v[:, T - S :]
        squared = jnp.sum(own * own, -1, keepdims=True)
        unit = jnp.where(squared > 0, own / jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
        o = o - jnp.sum(o * unit, -1, keepdims=True) * unit
    return o


def results_float64(q, k, v, dy, xsa, first=None):
    with jax.enable_x64(True):
        arrays = [np.asarray(a, np.float64) for a in (q, k, v, dy)]
        return [np.asarray(a) for a in results(functools.partial(attention_float64, xsa=xsa, first=first), *arrays)]


def results(function, q, k, v, dy):
    @jax.jit
    def run(q, k, v, dy):
        y, pullback = jax.vjp(function, q, k, v)
        return y, *pullback(dy)

    return run(q, k, v, dy)


def assert_close(got, expected, dtype):
    for name, a, b in zip(("y", "dq", "dk", "dv"), got, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error < TOLERANCE[jnp.dtype(dtype).name], f"{name}: relative L2 error {error:.2e}"


LONG = (1, 1030, 4, 2, 16)  # the kv heads take turns
SHORT, RECIPE, WIDE, ODD = (2, 64, 4, 2, 32), (1, 96, 8, 4, 64), (1, 300, 2, 1, 128), (1, 80, 3, 3, 16)
CASES = [
    *[("xla", shape, dtype, True) for shape in (SHORT, RECIPE, WIDE, ODD) for dtype in ("float32", "bfloat16")],
    *[("xla", SHORT, dtype, False) for dtype in ("float32", "bfloat16")],
    ("xla", LONG, "float32", True),
    ("xla", LONG, "bfloat16", False),
    *[("native", shape, "float32", True) for shape in (SHORT, RECIPE, WIDE, ODD, (2, 37, 4, 1, 16))],
    ("native", LONG, "float32", False),
    ("splash", (1, 130, 4, 2, 64), "float32", True),  # T padded
    ("splash", (1, 128, 4, 2, 64), "bfloat16", True),
    ("mosaic", (1, 200, 2, 1, 64), "bfloat16", True),  # T padded
    ("mosaic", (1, 128, 2, 2, 64), "bfloat16", False),
    ("mosaic", (1, 128, 2, 1, 32), "float16", True),
    ("mosaic", (1, 128, 2, 1, 128), "bfloat16", True),
    ("mosaic", (1, 512, 4, 2, 64), "bfloat16", True),  # more blocks than pipeline stages
]
PARAMETERS = [
    pytest.param(*case, id="{}-B{}T{}H{}G{}K{}-{}-{}".format(case[0], *case[1], case[2], "xsa" if case[3] else "plain"), marks=marks)
    for case in CASES
    for marks in [
        [needs_interpreter] * (case[0] == "mosaic")
        + [needs_compiler] * (case[0] == "native")
        + [pytest.mark.slow] * (case[0] == "mosaic" and case[1][1] > 256)
    ]
]


@pytest.mark.parametrize(("implementation", "shape", "dtype", "xsa"), PARAMETERS)
def test_forward_and_gradients_match_float64(implementation, shape, dtype, xsa):
    q, k, v, dy = inputs(*shape, dtype)
    got = results(functools.partial(IMPLEMENTATIONS[implementation], xsa=xsa), q, k, v, dy)
    assert_close(got, results_float64(q, k, v, dy, xsa), dtype)


@pytest.mark.parametrize("xsa", [True, pytest.param(False, marks=pytest.mark.slow)])
@needs_interpreter
def test_gate_in_the_kernel_matches_float64(xsa):
    """With a gate that is shut and one whose sigmoid is zero in float32."""
    q, k, v, dy = inputs(1, 130, 2, 1, 64, "bfloat16")
    gate = jax.random.normal(jax.random.key(1), q.shape[:3]).at[0, 3, 0].set(-20).at[0, 100].set(-200)

    def run(attention, *arrays):
        y, pullback = jax.vjp(lambda q, k, v, gate: attention(q, k, v, gate), *arrays[:4])
        return y, *pullback(arrays[4])

    got = run(lambda q, k, v, gate: mosaic_gpu.xsa_attention(q, k, v, xsa=xsa, gate_BSH=gate, interpret=True), q, k, v, gate, dy)
    with jax.enable_x64(True):
        plain = lambda q, k, v, gate: attention_float64(q, k, v, xsa) * jax.nn.sigmoid(gate)[..., None]  # noqa: E731
        expected = [np.asarray(a) for a in run(plain, *(np.asarray(a, np.float64) for a in (q, k, v, gate, dy)))]
    assert_close(got[:4], expected[:4], "bfloat16")
    assert np.isfinite(got[4]).all()
    np.testing.assert_allclose(got[4], expected[4], atol=2e-2 * np.abs(expected[4]).max())


@pytest.mark.parametrize("borders", [None, (5, 6, 40, 128)])
@pytest.mark.parametrize(
    ("backend", "last", "dtype"),
    [
        pytest.param("pallas", 130, "bfloat16", marks=needs_interpreter),
        *[pytest.param("native", last, "float32", marks=needs_compiler) for last in (130, 70)],
    ],
)
def test_factors_of_queries_keys_and_values_match_float64(backend, last, dtype, borders):
    """One head with a negative gain and one with none at all, and the gradients of factors that q, k and v hold already."""
    q, k, v, dy = inputs(1, 130, 3, 1, 64, dtype)
    q, dy = q[:, -last:], dy[:, -last:]
    first = None if borders is None else first_keys(1, 130, borders)[:, -last:]
    gain, logs = jnp.asarray([1.5, -0.5, 0.0]), [jnp.zeros(x.shape[:3]) for x in (q, k, v)]

    def run(attention, q, k, v, gain, *logs_dy):
        y, pullback = jax.vjp(attention, q, k, v, gain, *logs_dy[:3])
        return y, *pullback(logs_dy[3])

    attention = functools.partial(mosaic_gpu.xsa_attention, interpret=True) if backend == "pallas" else native.xsa_attention
    got = run(lambda q, k, v, *factors: attention(q, k, v, xsa=True, first_BS=first, factors=factors), q, k, v, gain, *logs, dy)

    def plain(q, k, v, gain, *logs):
        q, k, v = (x * jnp.exp(log)[..., None] for x, log in zip((q, k, v), logs, strict=True))
        return attention_float64(q * gain[:, None], k, v, True, first)

    with jax.enable_x64(True):
        expected = [np.asarray(a) for a in run(plain, *(np.asarray(a, np.float64) for a in (q, k, v, gain, *logs, dy)))]
    assert_close(got[:4], expected[:4], dtype)
    for a, b in zip(got[4:], expected[4:], strict=True):
        np.testing.assert_allclose(a, b, atol=(1e-2 if dtype == "bfloat16" else 1e-5) * np.abs(b).max())


# One row with a document of one token, documents inside a block, one that starts on its edge, and one longer than a block.
BORDERS = (5, 6, 40, 128, 129, 290)
DOCUMENTS = [
    ("xla", (2, 70, 4, 2, 16), "float32", True),
    ("xla", LONG, "float32", True),
    ("xla in blocks", (2, 402, 4, 2, 16), "float32", True),  # the last block is shorter
    pytest.param("native", (2, 402, 4, 2, 16), "float32", True, marks=needs_compiler),
    pytest.param("native", (1, 130, 2, 1, 64), "float32", False, marks=needs_compiler),
    ("splash", (2, 130, 4, 2, 64), "float32", True),
    pytest.param("mosaic", (1, 256, 2, 1, 64), "bfloat16", True, marks=needs_interpreter),
    pytest.param("mosaic", (2, 600, 2, 1, 64), "bfloat16", True, marks=[needs_interpreter, pytest.mark.slow]),  # padded, blocks skipped
    pytest.param("mosaic", (1, 384, 2, 2, 128), "bfloat16", False, marks=[needs_interpreter, pytest.mark.slow]),
]


@pytest.mark.parametrize(("implementation", "shape", "dtype", "xsa"), DOCUMENTS)
def test_inside_documents_forward_and_gradients_match_float64(implementation, shape, dtype, xsa):
    q, k, v, dy = inputs(*shape, dtype)
    first = first_keys(*shape[:2], BORDERS)
    got = results(functools.partial(IMPLEMENTATIONS[implementation], xsa=xsa, first_BS=first), q, k, v, dy)
    assert_close(got, results_float64(q, k, v, dy, xsa, first), dtype)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("first", [None, first_keys(2, 100, BORDERS)])
@pytest.mark.parametrize("queries", [1, 70])
def test_suffix_of_queries_equals_the_suffix_of_all(queries, first, backend):
    q, k, v, _ = inputs(2, 100, 4, 2, 16)
    whole = jax.jit(functools.partial(xsa_attention, xsa=True))(q, k, v, first_BS=first)
    part = jax.jit(functools.partial(xsa_attention, xsa=True, backend=backend))(
        q[:, -queries:], k, v, first_BS=None if first is None else first[:, -queries:]
    )
    np.testing.assert_allclose(part, whole[:, -queries:], atol=2e-6)


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_of_a_suffix_of_queries(backend):
    q, k, v, dy = inputs(2, 100, 4, 2, 16)
    got = results(functools.partial(xsa_attention, xsa=True, backend=backend), q[:, -70:], k, v, dy[:, -70:])
    assert_close(got, results_float64(q[:, -70:], k, v, dy[:, -70:], True), "float32")


@pytest.mark.parametrize("backend", ON_CPU)
def test_no_gradient_crosses_a_document_border(backend):
    q, k, v, _ = inputs(1, 72, 2, 1, 16)
    first, document = first_keys(1, 72, (20, 50)), slice(20, 50)
    total = lambda q, k, v: jnp.sum(xsa_attention(q, k, v, xsa=True, first_BS=first, backend=backend)[:, document] ** 2)  # noqa: E731
    for gradient in map(np.array, jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)):
        assert gradient[:, document].any()
        gradient[:, document] = 0
        assert not gradient.any()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("xsa", [True, False])
def test_causal_by_gradient_zeros(xsa, backend):
    q, k, v, _ = inputs(1, 72, 2, 1, 16)
    position = 40
    total = lambda q, k, v: jnp.sum(xsa_attention(q, k, v, xsa=xsa, backend=backend)[:, position] ** 2)  # noqa: E731
    for gradient in jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v):
        assert not gradient[:, position + 1 :].any() and gradient[:, position].any()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_stays_none(value, backend):
    """One bad key: every query that sees it has no output, and no gradient; those before it are as they were."""
    q, k, v, _ = inputs(1, 70, 2, 1, 16, "float32")
    bad = k.at[0, 20].multiply(value)
    attend = functools.partial(xsa_attention, xsa=True, backend=backend)
    y, pullback = jax.vjp(attend, q, bad, v)
    assert np.isnan(y[:, 20:]).all() and np.isfinite(y[:, :20]).all()
    assert np.isnan(pullback(y)[0][:, 20:]).all()


def test_xsa_output_is_orthogonal_to_the_own_value():
    q, k, v, _ = inputs(2, 64, 4, 2, 32)
    y = jax.jit(functools.partial(xsa_attention, xsa=True))(q, k, v)
    along = jnp.einsum("btgrk,btgk->btgr", y.reshape(2, 64, 2, 2, 32), v)
    assert float(jnp.abs(along).max()) < 2e-6 * 32


def test_zero_values_give_finite_gradients_and_zero_xsa_part():
    _, _, v, dy = inputs(1, 8, 2, 1, 16)
    v = jnp.zeros_like(v)
    y, pullback = jax.vjp(exclude_self_value, 2 * dy, v)
    do, dv = pullback(dy)
    np.testing.assert_array_equal(y, 2 * dy)
    np.testing.assert_array_equal(do, dy)
    np.testing.assert_array_equal(dv, 0)


def test_epilogue_matches_the_recorded_pytorch_tensors(shared):
    with np.load(shared / "reference/pr372/units.npz") as stored:
        out = exclude_self_value(jnp.asarray(stored["xsa/in/y"]), jnp.asarray(stored["xsa/in/v"]))
        np.testing.assert_allclose(out, stored["xsa/out/y"], atol=2e-6)


BAD_CALLS = {
    "not one of": dict(backend="triton"),
    "not a multiple": dict(H=3),
    "share one dtype": dict(k_dtype="bfloat16"),
    "suffix of queries": dict(S=8, backend="pallas"),
    "key positions": dict(S=32),
    "needs bfloat16": dict(backend="cudnn"),
    "cannot stay inside documents: use 'pallas' or 'xla'": dict(backend="cudnn", first=jnp.zeros((1, 16), jnp.int32)),
    "gate must be": dict(gate=jnp.zeros((1, 16, 4))),
    "first must be int32": dict(first=jnp.zeros((1, 15), jnp.int32)),
    "has kernels for GPU and TPU": dict(backend="pallas"),
    "'native' needs float32": dict(backend="native", dtype="bfloat16"),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_unsupported_calls_are_refused(message):
    options = dict(S=16, H=4, dtype="float32", k_dtype=None, first=None, gate=None, backend="xla") | BAD_CALLS[message]
    q = jnp.zeros((1, options["S"], options["H"], 64), options["dtype"])
    k, v = jnp.zeros((1, 16, 2, 64), options["k_dtype"] or options["dtype"]), jnp.zeros((1, 16, 2, 64), options["dtype"])
    with pytest.raises(ValueError, match=message):
        xsa_attention(q, k, v, xsa=True, first_BS=options["first"], gate_BSH=options["gate"], backend=options["backend"])


@pytest.mark.parametrize("module", [mosaic_gpu, splash_tpu])
@pytest.mark.parametrize(("dtype", "head_dim", "message"), [("float64", 64, "needs bfloat16"), ("bfloat16", 48, "needs head_dim")])
def test_kernels_refuse_what_they_do_not_have(module, dtype, head_dim, message):
    arrays = [jax.ShapeDtypeStruct((1, 128, 2, head_dim), dtype)] * 3
    with pytest.raises(ValueError, match=message):
        module.xsa_attention(*arrays, xsa=True)


def test_backends_of_a_platform_best_first(monkeypatch):
    monkeypatch.setenv("CXX", "c++")
    for measured, backends in ((True, ("native", "xla")), (False, ("xla", "native"))):
        monkeypatch.setattr(library, "MEASURED", measured)
        assert supported_backends("cpu", 64, jnp.float32) == backends
    assert supported_backends("cpu", 24, jnp.float32) == supported_backends("cpu", 64, jnp.bfloat16) == ("xla",)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    assert supported_backends("cpu", 64, jnp.float32) == ("xla",)  # no compiler
    assert supported_backends("cuda", 64, jnp.float32) == ("xla",)
    assert supported_backends("gpu", 64, jnp.bfloat16) == ("cudnn", "pallas", "xla")
    assert supported_backends("gpu", 64, jnp.bfloat16, documents=True) == ("pallas", "xla")
    assert supported_backends("tpu", 64, jnp.bfloat16) == ("pallas", "xla")
    with pytest.raises(ValueError, match="unknown platform"):
        supported_backends("rocm", 64, jnp.bfloat16)


def test_program_text_is_checked_for_the_backend():
    text = jax.jit(lambda q, k, v: xsa_attention(q, k, v, xsa=True)).lower(*inputs(1, 16, 2, 1, 16)[:3]).as_text()
    assert_backend(text, "xla")
    with pytest.raises(ValueError, match="shows native"):
        assert_backend('custom_call_target="golf_xsa_forward"', "xla")
    for backend in ("native", "pallas", "cudnn"):
        with pytest.raises(ValueError, match="shows xla"):
            assert_backend(text, backend)
    with pytest.raises(ValueError, match="shows cudnn"):
        assert_backend('custom_call_target="__cudnn$fmhaSoftmax"', "xla")

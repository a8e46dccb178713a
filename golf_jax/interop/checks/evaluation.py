"""Evaluation: window lists, standard and sliding sums, test-time training, Hessians for GPTQ."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from golf_jax.artifact.calibration import collect_hessians
from golf_jax.config import ModelConfig, ScoreFirstConfig, TTTConfig, load_recipe
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation import METHODS, Result, Stream
from golf_jax.evaluation.windows import chunk_windows, sliding_windows
from golf_jax.interop.checks.base import CheckResult, Comparison, Context, Reference
from golf_jax.interop.checks.quantization import dequantized
from golf_jax.mesh import make_mesh
from golf_jax.model import Model, from_tensors, to_tensors

ROWS, TTT_ROWS = 8, 32  # windows per device and forward pass: small, so that few batch shapes occur


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """On a CPU the unrolled small models of the references take far longer to optimise than to run."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu" or before)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def byte_tables(z: Reference) -> ByteTables:
    """The byte tables of a reference file, whichever names it uses."""
    keys = [k for k in z if k.startswith("lut")]
    base, space, boundary = (next(z[k] for k in keys if part in k) for part in ("base_bytes", "leading_space", "boundary"))
    return ByteTables(base.astype(np.int16), space.astype(bool), boundary.astype(bool))


def setting(settings: dict[str, Any], *names: str) -> Any:
    """The first of several spellings that the PR's settings hold."""
    lower = {k.lower(): v for k, v in settings.items()}
    return next(lower[n] for n in names if n in lower)


def sums(z: Reference, tag: str) -> np.ndarray:
    """nats, tokens, bytes under `tag`; a file without a token count gives NaN there."""
    packed = z.first(f"{tag}/sums", f"{tag}_sums")
    if packed is not None:
        return np.asarray(packed, np.float64)
    prefix = f"{tag}/" if tag else ""
    count = z.first(f"{prefix}token_count")
    tokens = np.nan if count is None else float(count)
    return np.array([float(z[f"{prefix}nll_sum"]), tokens, float(z[f"{prefix}byte_count"])])


@dataclass(frozen=True)
class Case:
    """One stored evaluation."""

    tag: str
    mode: str
    stride: int = 0
    tokens: int = 0
    """Only this many tokens of the stream, not cut to whole rows; 0: all of it, cut."""
    variant: str = ""
    """noqat, noloop, or dequant: with the weights of the PR's own packed file."""


def _cases(ctx: Context, z: Reference, name: str, stride: int) -> list[Case]:
    if ctx.portable:
        cases = [Case("standard", "standard"), Case("sliding", "sliding", stride)]
        cases += [Case("sliding_ragged", "sliding", stride, int(z["sliding_ragged/tokens_used"]))]
        cases += [Case(f"{m}_dequant", m, stride, 0, "dequant") for m in ("standard", "sliding") if f"{m}_dequant/nll_sum" in z]
        return cases + [Case(f"{m}_noloop", m, stride, 0, "noloop") for m in ("standard", "sliding") if f"{m}_noloop/nll_sum" in z]
    if ctx.recipe == "pr372":
        cases = [Case(f"{m}{s}", m, stride, 0, s[1:]) for m in ("standard", "sliding") for s in ("", "_noqat")]
        return [*cases, Case("sliding_dequant", "sliding", stride, 0, "dequant")]
    if ctx.recipe == "pr562":
        short = [Case(f"short_{x}", "sliding", stride, int(z[f"short_{x}/tokens_used"])) for x in "abc"]
        return [Case("std", "standard"), Case("slide", "sliding", stride), *short]
    if ctx.recipe == "pr638":
        strides = sorted({int(m[1]) for k in z if (m := re.match(r"fp32/slide(\d+)_sums", k))})
        names = {"fp32": "", "int6": "dequant"}
        cases = [Case(f"{n}/std", "standard", 0, 0, v) for n, v in names.items()]
        return cases + [Case(f"{n}/slide{s}", "sliding", s, 0, v) for n, v in names.items() for s in strides]
    if ctx.recipe == "pr1182":
        ragged = [int(k.split("/")[0].removeprefix("windows_")) for k in z if k.startswith("windows_") and k.endswith("/table")]
        cases = [Case("std", "standard"), Case("slide", "sliding", stride)]
        return cases + [Case(f"windows_{n}", "sliding", stride, n + 1) for n in ragged]
    cases = [Case("std_loop", "standard"), Case("std_noloop", "standard", 0, 0, "noloop")]
    for tag in [k.split("/")[0] for k in z if k.endswith("/n_tokens")]:
        cases.append(Case(tag, "sliding", stride, int(z[f"{tag}/n_tokens"]) + 1, "noloop" if "noloop" in tag else ""))
    return cases


@quick_compilation()
def check_eval(ctx: Context) -> list[CheckResult]:
    """eval.npz, eval2048.npz (or the portable file): counts equal, sums of nll within the INDEX's tolerance, window lists equal."""
    names = ["portable"] if ctx.portable else [n for n in ("eval", "eval2048") if ctx.has(n)]
    bar = 1e-6 if ctx.recipe in ("pr638", "pr1182") and not ctx.portable else 1e-5
    results = []
    for name in names:
        z = ctx.file(name)
        c_nll, c_counts = Comparison(f"{name}: nll sums", bar, "rel"), Comparison(f"{name}: token and byte counts", 0.0, "equal")
        settings = z.config()
        seq_len = int(setting(settings, "eval_seq_len", "seq_len", "train_seq_len"))
        stride = int(setting(settings, "eval_stride", "sliding_stride"))
        for case in _cases(ctx, z, name, stride):
            result = _evaluate(ctx, z, case, seq_len)
            nll, tokens, count = sums(z, case.tag)
            c_nll.add(case.tag, result.score.nll_nats, nll)
            c_counts.add(f"{case.tag} bytes", result.score.bytes, count)
            if np.isfinite(tokens):
                c_counts.add(f"{case.tag} tokens", result.score.tokens, tokens)
            if f"{case.tag}/window_nll_sums" in z:
                c_nll.add(f"{case.tag} windows", _window_sums(result, seq_len, case.stride), z[f"{case.tag}/window_nll_sums"])
        results += [c_nll.result(), c_counts.result()]
        windows = check_windows(ctx, z, name, seq_len, stride)
        results += [windows] if windows.compared else []
    return results


def _evaluate(ctx: Context, z: Reference, case: Case, seq_len: int) -> Result:
    config, params = _weights(ctx, case.variant)
    if ctx.recipe == "pr1182":  # eval2048 has the real run's RoPE reference length
        config = replace(config, rope_train_len=int(setting(z.config(), "rope_train_seq_len")))
    tokens = next(z[k] for k in ("eval_tokens", "val_tokens", "val_tokens_first") if k in z).astype(np.uint16)
    tokens = tokens[: case.tokens] if case.tokens else tokens
    tables = byte_tables(z if any(k.startswith("lut") for k in z) else ctx.file("eval"))
    stream = Stream(tokens, tables, seq_len, ROWS) if case.tokens else Stream.of(tokens, tables, seq_len, ROWS)
    settings = replace(load_recipe(ctx.recipe).eval.sliding, stride=case.stride)
    model = Model(config, params, looping=case.variant != "noloop")
    return METHODS[case.mode](model, replace(stream, keep_scores=True), make_mesh(ctx.devices), settings)


def _window_sums(result: Result, seq_len: int, stride: int) -> np.ndarray:
    """Sum of nll per window where every target is scored once (PR 2005)."""
    assert result.scores is not None
    w = sliding_windows("exact", len(result.scores), seq_len, stride)
    edges = np.append(w.start + w.score_from, len(result.scores))
    return np.array([result.scores[a:b].sum(dtype=np.float64) for a, b in zip(edges, edges[1:], strict=False)])


def _weights(ctx: Context, variant: str) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    m = ctx.model()
    config = m.config
    if variant == "noqat":
        config = replace(config, fake_quant=replace(config.fake_quant, in_eval=False))
    if variant == "dequant":
        return config, from_tensors(config, dequantized(ctx))
    return config, m.params


def check_windows(ctx: Context, z: Reference, name: str, seq_len: int, stride: int) -> CheckResult:
    """Window lists stored beside the sums: (start, length, first scored offset)."""
    c = Comparison(f"{name}: window lists", 0.0, "equal")
    rule = load_recipe(ctx.recipe).eval.sliding.windows
    for key in z:
        if m := re.fullmatch(r"windows/n(\d+)_seq(\d+)_stride(\d+)/starts", key):  # PR 372: n tokens
            n, t, s = map(int, m.groups())
            w = sliding_windows(rule, n - 1, t, s)
            c.add(key, w.start, z[key])
            scored = [w.start[0] + w.score_from[0] + 1, w.start[-1] + w.length[-1]]
            c.add(f"{key} scored", scored, z[key.replace("starts", "scored_target_index_first_last")])
        elif m := re.fullmatch(r"winlist/total(\d+)_seq(\d+)_stride(\d+)", key):  # PR 638
            w = sliding_windows(rule, *map(int, m.groups()))
            c.add(key, np.stack([w.start, w.length, w.score_from], 1), z[key])
        elif m := re.fullmatch(r"windows_(\d+)/table", key):  # PR 1182
            w = sliding_windows(rule, int(m[1]), seq_len, stride)
            c.add(key, np.stack([w.start, w.length, w.start + w.score_from, w.start + w.length], 1), z[key])
        elif m := re.fullmatch(r"(short_\w)/window_start", key):  # PR 562
            w = sliding_windows(rule, int(z[f"{m[1]}/tokens_used"]) - 1, seq_len, stride)
            ours = np.stack([w.start, w.length, w.score_from], 1)
            c.add(key, ours, np.stack([z[f"{m[1]}/{k}"] for k in ("window_start", "window_len", "score_from")], 1))
        elif m := re.fullmatch(r"(tail\d)/window_start_scorefrom_len", key):  # PR 2005
            w = sliding_windows(rule, int(z[f"{m[1]}/n_tokens"]), seq_len, stride)
            c.add(key, np.stack([w.start, w.score_from, w.length], 1), z[key])
    return c.result()


@dataclass(frozen=True)
class Bars:
    """Tolerances of one test-time training run."""

    nll: float
    """Sums of nll, in total and per chunk: relative."""
    loss: float
    """Loss of every step: absolute."""
    weights: float
    """Weights after the run: relative L2 of the weight, or of its change."""
    of_change: bool = False
    norm: float = 1e-3
    """Gradient norms before clipping: relative."""
    first_loss: float = 0.0
    """Of the first 30 steps, before the rounding of fake quantization has amplified float noise."""


# Tolerances of the INDEX files by (recipe, with fake quantization). PR 562: 5e-4 bits per byte, which are at most 10.
BARS = {
    ("pr562", True): Bars(5e-5, 2e-3, 5e-3, norm=5e-2, first_loss=1e-4), ("pr562", False): Bars(5e-5, 2e-3, 5e-4, first_loss=1e-5),
    ("pr1182", True): Bars(1e-6, 1e-4, 1e-5, norm=1e-4), ("pr1182", False): Bars(1e-6, 1e-4, 1e-5, norm=1e-4),
    ("pr2005", False): Bars(1e-4, 1e-3, 2e-2, of_change=True),
}  # fmt: skip
# Those of the portable files' INDEX: fewer digits were kept there, and weights lie nearer to rounding boundaries.
PORTABLE_BARS = {
    ("pr562", True): Bars(1e-3, 5e-3, 2e-3, norm=5e-2), ("pr562", False): Bars(1e-5, 1e-4, 1e-3),
    ("pr1182", True): Bars(1e-3, 5e-2, 2e-2, of_change=True, norm=5e-2), ("pr1182", False): Bars(1e-5, 1e-4, 2e-2, of_change=True),
    ("pr2005", False): Bars(1e-5, 1e-4, 2e-2, of_change=True),
}  # fmt: skip
FIRST_STEPS = 30


@dataclass(frozen=True)
class TTTCase:
    tag: str
    fake_quant: bool
    ranks: int = 1


@quick_compilation()
def check_ttt(ctx: Context) -> list[CheckResult]:
    """ttt.npz, ttt_4rank.npz (or the portable file) of PRs 562, 1182 and 2005."""
    if ctx.recipe not in ("pr562", "pr1182", "pr2005"):
        return []
    results = []
    if ctx.portable:
        tags = ["ttt"] + ["ttt_noqat"] * (ctx.recipe != "pr2005")
        for tag in tags:
            results += _check_run(ctx, "portable", TTTCase(tag, ctx.recipe != "pr2005" and tag == "ttt"))
        return results
    if ctx.has("ttt"):
        runs = {"pr562": {"qat": True, "noqat": False}, "pr1182": {"qat_on": True, "qat_off": False}, "pr2005": {"": False}}
        for tag, fake_quant in runs[ctx.recipe].items():
            results += _check_run(ctx, "ttt", TTTCase(tag, fake_quant))
    if ctx.has("ttt_4rank"):
        results += _check_run(ctx, "ttt_4rank", TTTCase("", True, 4))
    return results


def ttt_method(ctx: Context, settings: dict[str, Any], case: TTTCase) -> tuple[str, TTTConfig]:
    """The recipe's test-time training at the size of a reference run: name of the method, and its settings."""
    base = load_recipe(ctx.recipe).eval
    name, ttt = ("adapt_first", base.adapt_first) if base.adapt_first.on else ("score_first", base.score_first)
    chunked = {"chunk_tokens": int(settings.get("ttt_chunk_tokens", base.score_first.chunk_tokens))} if name == "score_first" else {}
    return name, replace(
        ttt,
        stride=int(setting(settings, "eval_stride")),
        epochs=int(setting(settings, "ttt_epochs")),
        lr=float(setting(settings, "ttt_lr")),
        ranks=case.ranks,
        fake_quant=case.fake_quant,
        batch_rows=int(settings.get("ttt_batch_seqs", ttt.batch_rows)),
        **chunked,
    )


def _check_run(ctx: Context, name: str, case: TTTCase) -> list[CheckResult]:
    z, config = ctx.file(name), ctx.model().config
    settings = z.config()
    seq_len = int(setting(settings, "eval_seq_len", "train_seq_len"))
    method, ttt = ttt_method(ctx, settings, case)
    source = z if "val_tokens" in z or "eval_tokens" in z else ctx.file("eval")
    tokens = source["eval_tokens" if ctx.portable else "val_tokens"].astype(np.uint16)
    before = from_tensors(config, dequantized(ctx)) if ctx.recipe == "pr562" else ctx.model().params
    tables = byte_tables(z if ctx.portable else ctx.file("eval"))
    stream = Stream.of(tokens, tables, seq_len, TTT_ROWS)
    result = METHODS[method](Model(config, before), stream, make_mesh(ctx.devices), ttt)
    trace, bars = result.trace, (PORTABLE_BARS if ctx.portable else BARS)[ctx.recipe, case.fake_quant]
    assert trace is not None
    after, start = to_tensors(config, trace.params), to_tensors(config, before)
    label = f"{name} {case.tag}".strip()
    prefix = f"{case.tag}/" if case.tag else ""
    c_nll, c_counts = Comparison(f"{label}: nll sums", bars.nll, "rel"), Comparison(f"{label}: counts", 0.0, "equal")
    c_first = Comparison(f"{label}: step losses, first {FIRST_STEPS}", bars.first_loss, "abs")
    c_loss = Comparison(f"{label}: step losses", bars.loss, "abs")
    c_norm = Comparison(f"{label}: step gradient norms", bars.norm, "rel")
    c_weights = Comparison(f"{label}: final weights", bars.weights, "rel L2")
    eval_sums = z.first(f"{prefix}eval_sums")
    nll, *counts = sums(z, case.tag) if eval_sums is None else eval_sums
    c_nll.add("total", result.score.nll_nats, nll)
    c_counts.add("tokens and bytes", [result.score.tokens, result.score.bytes], counts)
    for key, column, c in _chunk_references(z, prefix, ctx):
        c_target = c_nll if c == "nll" else c_counts
        c_target.add(key, trace.chunks[:, 0 if c == "nll" else slice(1, 3)], column)
    split = FIRST_STEPS if bars.first_loss else 0
    losses = _losses(z, prefix, ctx)
    for c, steps in ((c_first, slice(split)), (c_loss, slice(split, None))):
        if losses[steps].size:
            c.add("loss", trace.loss[steps], losses[steps])
    norms = z.first(f"{prefix}step_grad_norm", f"{prefix}grad_norm")
    if norms is not None:
        c_norm.add("gradient norm before clipping", trace.grad_norm, norms)
    for key, want in _finals(z, prefix, ctx).items():
        ours, old = _tensor(after, key, config.num_layers), _tensor(start, key, config.num_layers)
        rows = z["tok_emb_rows"] if key == "tok_emb.weight" and "tok_emb_rows" in z else slice(len(want) if want.ndim else None)
        ours, old = (ours[rows], old[rows]) if want.ndim else (ours, old)
        if not bars.of_change:
            c_weights.add(key, ours, want)
        elif "q_gain" not in key:  # moves by about its float32 granularity
            c_weights.add(key, ours - old, want - old)
    results = [c_nll, c_counts, c_first, c_loss, c_norm, c_weights]
    if isinstance(ttt, ScoreFirstConfig):
        results.append(_check_order(z, label, result, seq_len, ttt))
    return [c.result() for c in results if c.compared]


def _chunk_references(z: Reference, prefix: str, ctx: Context) -> list[tuple[str, np.ndarray, str]]:
    """Stored sums per chunk: (key, array, nll or counts)."""
    if f"{prefix}chunk_cumulative" in z:  # PR 1182: chunk, nll, tokens, bytes, accumulated
        steps = np.diff(z[f"{prefix}chunk_cumulative"][:, 1:4], axis=0, prepend=np.zeros((1, 3)))
        return [("chunks", steps[:, 0], "nll"), ("chunk counts", steps[:, 1:], "counts")]
    if f"{prefix}chunk_nll_tokens_bytes" in z:  # PR 2005
        table = z[f"{prefix}chunk_nll_tokens_bytes"]
        return [("chunks", table[:, 0], "nll"), ("chunk counts", table[:, 1:], "counts")]
    if f"{prefix}chunk_nll_sum" in z:
        counts = [z.first(f"{p}{k}") for p in (prefix, "ttt/") for k in ("chunk_token_count", "chunk_byte_count")]
        counts = [c for c in counts if c is not None][:2]
        return [("chunks", z[f"{prefix}chunk_nll_sum"], "nll"), ("chunk counts", np.stack(counts, 1), "counts")]
    return []


def _losses(z: Reference, prefix: str, ctx: Context) -> np.ndarray:
    if "train_loss_chunk_epoch_loss" in z:
        return z["train_loss_chunk_epoch_loss"][:, 2]
    if "loss_per_rank" in z:
        return z["loss_per_rank"].mean(axis=0)
    found = z.first(f"{prefix}step_loss")
    return z[f"{prefix}loss"] if found is None else found


def _finals(z: Reference, prefix: str, ctx: Context) -> dict[str, np.ndarray]:
    """Stored weights after the run, by the PR's name (whole tensors, first rows, slices of banks)."""
    found = z.under(f"{prefix}final/") | z.under(f"{prefix}final_head128/") | z.under(f"{prefix}final_slice/")
    if ctx.recipe == "pr2005" and "delta_rows/tok_emb.weight" in z:
        start = ctx.model().params["tok_emb"][z["tok_emb_rows"]]
        found["tok_emb.weight"] = start + z["delta_rows/tok_emb.weight"]
    return found | z.under("step15/")


_BANK = re.compile(r"(\w+)_bank[_\[](\d+)\]?")
_IN_BANK = {"qo": ("attn.c_q", "attn.proj"), "kv": ("attn.c_k", "attn.c_v"), "mlp_up": ("mlp.fc",), "mlp_down": ("mlp.proj",)}


def _tensor(tensors: dict[str, np.ndarray], name: str, layers: int) -> np.ndarray:
    """A tensor by the PR's name, also `qo_bank[16]` or `qo_bank_16` for one slice of a bank."""
    if m := _BANK.fullmatch(name):
        part, layer = divmod(int(m[2]), layers)
        name = f"blocks.{layer}.{_IN_BANK[m[1]][part]}.weight"
    return tensors[name]


def _check_order(z: Reference, label: str, result: Result, seq_len: int, ttt: ScoreFirstConfig) -> Comparison:
    """Chunk of every window, and that every score came before the first update that used its target."""
    c = Comparison(f"{label}: windows per chunk, order", 0.0, "equal")
    c.add("order violations", result.facts.order_violations, 0)
    w, chunk = chunk_windows(ttt.windows, result.facts.targets, seq_len, ttt.stride, ttt.chunk_tokens)
    if "chunk_windows_flat" in z:
        c.add("chunk_windows_flat", np.stack([chunk, w.start], 1), z["chunk_windows_flat"])
    if "window_start_scorefrom_len_chunk" in z:
        want = z["window_start_scorefrom_len_chunk"]
        c.add("window_start_scorefrom_len_chunk", np.stack([w.start, w.score_from, w.length, chunk], 1), want)
    return c


@quick_compilation()
def check_hessians(ctx: Context) -> list[CheckResult]:
    """Hessians of PR 2005 from its calibration tokens (quant.npz or the portable file)."""
    if ctx.recipe != "pr2005" or not (ctx.portable or ctx.has("quant")):
        return []
    z, m = ctx.file("quant"), ctx.model()
    ours = ctx.once("hessians", lambda: collect_hessians(m.config, m.params, z["calibration_tokens"], make_mesh(ctx.devices)))
    c_full, c_trace = Comparison("quant: Hessians", 1e-4, "of max"), Comparison("quant: Hessian traces", 1e-4, "rel")
    for name, want in z.under("hessian/").items():
        c_full.add(name, ours[name], want)
    traces = z.first("hessian_trace_json", "hessian_trace_all")
    for name, want in json.loads(str(traces)).items():
        c_trace.add(name, np.trace(ours[name].astype(np.float64)), want)
    return [c_full.result(), c_trace.result()]

"""Test-time training: one engine for the recipes.

`score_first` (PRs 1182, 2005): chunk by chunk, score the targets of a chunk, then train on them. Legal: every score is fixed before an
update sees its target; the ledger checks it target by target. `adapt_first` (PR 562) trains on the whole validation set and scores
afterwards: illegal, reproduced as a reference, and marked so wherever its number appears.

The ranks of the record runs exist here as weights only: the mean over ranks of each rank's mean loss is one weighted sum over
sequences, so any number of devices gives the same score.
"""

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from golf_jax.config import EvalConfig, GolfError, ModelConfig, TTTConfig
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation.fixed import share_of
from golf_jax.evaluation.ledger import Ledger
from golf_jax.evaluation.score import Result, Trace
from golf_jax.evaluation.scorer import Log, Shapes, WindowScorer, avals, gather, shapes_of
from golf_jax.evaluation.windows import chunk_windows, sliding_windows, truncate
from golf_jax.mesh import AXIS, REPLICATED, platform, put, replicate, replicated
from golf_jax.model import leaves, nll, resolve
from golf_jax.optim.adam import scale_by_adam
from golf_jax.optim.optimizer import norm_clip_factor, squared_norm

ADAM = (0.9, 0.999, 1e-8)  # PR 562, 6.4
STEP_ROWS = PartitionSpec(None, AXIS)  # [steps, rows, ...]

Params = dict[str, jax.Array]


class TTTState(NamedTuple):
    """What an update changes; donated to every call and never leaves the devices."""

    params: Params
    opt: Any


@dataclass(frozen=True)
class Plan:
    """Which sequences each step of one epoch takes, [steps, rows] each; spare rows weigh nothing."""

    sequence: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, sequences: int, ttt: TTTConfig, devices: int, micro: int) -> "Plan":
        """Contiguous share per rank, `batch_rows` of it per step. A sequence weighs 1 / (its rank's rows * ranks in that step)."""
        bounds = [sequences * r // ttt.ranks for r in range(ttt.ranks + 1)]
        steps = -(-max(np.diff(bounds)) // ttt.batch_rows)
        plans: list[tuple[list[int], list[float]]] = []
        for k in range(steps):
            shares = [range(a, b)[k * ttt.batch_rows : (k + 1) * ttt.batch_rows] for a, b in zip(bounds, bounds[1:], strict=False)]
            shares = [share for share in shares if share]
            plans.append(([i for s in shares for i in s], [1 / (len(s) * len(shares)) for s in shares for _ in s]))
        local = -(-max(len(rows) for rows, _ in plans) // devices)
        local = -(-local // min(local, micro)) * min(local, micro)
        sequence, weight = np.zeros((steps, local * devices), np.int64), np.zeros((steps, local * devices), np.float32)
        for k, (rows, weights) in enumerate(plans):
            sequence[k, : len(rows)], weight[k, : len(rows)] = rows, weights
        return cls(sequence, weight)

    def tokens(self, tokens: np.ndarray, first: int, seq_len: int) -> np.ndarray:
        """uint16 [steps, rows, T + 1]: sequences that begin at token `first`."""
        start = (first + self.sequence * seq_len).reshape(-1)
        rows = gather(tokens, start, np.full_like(start, seq_len), seq_len, len(start))
        return rows.reshape(*self.sequence.shape, seq_len + 1)


def lr_scales(config: ModelConfig, ttt: TTTConfig) -> dict[str, float]:
    """Factor of the learning rate per leaf, by the tensor's name as PR 562 does it: `.proj.` and `.fc.`"""
    factor = {".proj.": ttt.proj_lr_scale, ".fc.": ttt.fc_lr_scale}
    return {name: next((f for key, f in factor.items() if key in leaf.tensor), 1.0) for name, leaf in leaves(config).items()}


def optimizer(ttt: TTTConfig) -> optax.GradientTransformation:
    """Direction of a step. SGD momentum starts as the first gradient, undamped; states have the dtype of the parameters."""
    if ttt.optimizer == "sgd":
        return optax.trace(decay=ttt.momentum)
    return scale_by_adam(*ADAM)  # pyright: ignore[reportReturnType]


def initial_state(ttt: TTTConfig, params: Params) -> TTTState:
    """New buffers, which may be donated while the caller keeps its own."""
    return TTTState(jax.tree.map(jnp.copy, params), optimizer(ttt).init(params))


def update(ttt: TTTConfig, state: TTTState, grads: Params, lr: Any, scales: dict[str, float]) -> tuple[TTTState, jax.Array]:
    """One optimizer step: (new state, global gradient norm before clipping). scales: factor of the learning rate per leaf."""
    norm, factor = norm_clip_factor(squared_norm(grads), ttt.clip_norm or jnp.inf)
    grads = {n: (g * factor).astype(g.dtype) for n, g in grads.items()}
    direction, opt_state = optimizer(ttt).update(grads, state.opt)

    def move(name: str, p: jax.Array) -> jax.Array:
        d32 = jnp.asarray(direction[name], jnp.float32)  # pyright: ignore[reportIndexIssue, reportArgumentType, reportCallIssue]
        return (p.astype(jnp.float32) - lr * scales[name] * d32).astype(p.dtype)

    return TTTState({n: move(n, p) for n, p in state.params.items()}, opt_state), norm


@functools.lru_cache(maxsize=8)
def training_program(
    config: ModelConfig, ttt: TTTConfig, mesh: Mesh, shapes: Shapes, rows: tuple[int, int], seq_len: int, epochs: int, micro: int
) -> jax.stages.Compiled:
    """Compiled (state, tokens uint16 [steps, rows, T + 1], weight [steps, rows], lr [epochs, steps]) -> (state, loss, norm).

    loss, norm: [epochs, steps], before each update, norm before clipping. All epochs of a chunk are one scan; state is donated.
    rows: (steps, rows) of the plan. micro: rows per device and forward pass. Kept for the process.
    """
    scales = lr_scales(config, ttt)
    strength = 1.0 if ttt.fake_quant else None

    def loss_fn(params: Params, tokens_BT: jax.Array, weight_B: jax.Array) -> jax.Array:
        tokens_BT = tokens_BT.astype(jnp.int32)
        nll_BT = nll(config, params, tokens_BT[:, :-1], tokens_BT[:, 1:], fake_quant=strength)
        return jnp.sum(jnp.mean(nll_BT, -1) * weight_B)

    def gradient(params: Params, tokens_RT: jax.Array, weight_R: jax.Array) -> tuple[jax.Array, Params]:
        """Weighted loss and its gradient over this device's rows, `micro` at a time, float32."""

        def one(total: tuple[jax.Array, Params], batch: tuple[jax.Array, jax.Array]):
            loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
            return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, (loss, grads)), None

        zeros = (jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
        size = min(micro, len(weight_R))
        parts = tokens_RT.reshape(-1, size, seq_len + 1), weight_R.reshape(-1, size)
        if len(parts[0]) == 1:
            return one(zeros, (parts[0][0], parts[1][0]))[0]
        return jax.lax.scan(one, zeros, parts)[0]

    def step(state: TTTState, inputs: tuple[jax.Array, jax.Array, jax.Array]):
        tokens_RT, weight_R, lr = inputs
        loss, grads = jax.lax.psum(gradient(state.params, tokens_RT, weight_R), AXIS)
        grads = {n: g.astype(state.params[n].dtype) for n, g in grads.items()}
        state, norm = update(ttt, state, grads, lr, scales)
        return state, (loss, norm)

    def local(state: TTTState, tokens: jax.Array, weight: jax.Array, lr: jax.Array):
        def epoch(state: TTTState, lr_S: jax.Array):
            return jax.lax.scan(step, state, (tokens, weight, lr_S))

        state, (loss, norm) = jax.lax.scan(epoch, state, lr)
        return state, loss, norm

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(REPLICATED, STEP_ROWS, STEP_ROWS, REPLICATED),
        out_specs=(REPLICATED, REPLICATED, REPLICATED),
        check_vma=False,
    )
    split, whole = NamedSharding(mesh, STEP_ROWS), replicated(mesh)
    tokens = jax.ShapeDtypeStruct((*rows, seq_len + 1), jnp.uint16, sharding=split)
    weight = jax.ShapeDtypeStruct(rows, jnp.float32, sharding=split)
    lr = jax.ShapeDtypeStruct((epochs, rows[0]), jnp.float32, sharding=whole)
    state = jax.eval_shape(functools.partial(initial_state, ttt), avals(mesh, shapes))
    on_mesh = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)
    return jax.jit(sharded, donate_argnums=0).lower(on_mesh, tokens, weight, lr).compile()


class Trainer:
    """Trains on sequences of one stream: owns the state, and keeps losses, norms and learning rates of every step."""

    def __init__(
        self, config: ModelConfig, params: dict[str, Any], ttt: TTTConfig, mesh: Mesh, sequences: int, seq_len: int, epochs: int, rows: int
    ) -> None:
        config = resolve(config, platform(mesh))
        self.mesh, self.seq_len, self.epochs = mesh, seq_len, epochs
        self.plan = Plan.of(sequences, ttt, mesh.shape[AXIS], rows)
        self.weight = put(mesh, self.plan.weight, STEP_ROWS)
        on_mesh = replicate(mesh, params)
        self.program = training_program(config, ttt, mesh, shapes_of(on_mesh), self.plan.sequence.shape, seq_len, epochs, rows)
        self.state: TTTState = jax.jit(functools.partial(initial_state, ttt), out_shardings=replicated(mesh))(on_mesh)
        self.loss: list[np.ndarray] = []
        self.norm: list[np.ndarray] = []
        self.lr: list[np.ndarray] = []

    @property
    def steps(self) -> int:
        """Optimizer steps of one call."""
        return self.epochs * len(self.plan.sequence)

    def prepare(self, tokens: np.ndarray, first: int) -> jax.Array:
        """The sequences from token `first` on, on the devices."""
        return put(self.mesh, self.plan.tokens(tokens, first, self.seq_len), STEP_ROWS)

    def train(self, tokens: jax.Array, lr: np.ndarray) -> None:
        """All epochs of one call; lr: [epochs, steps]. Waits for the result."""
        lr_ES = put(self.mesh, lr.astype(np.float32), REPLICATED)
        self.state, loss, norm = self.program(self.state, tokens, self.weight, lr_ES)
        self.loss.append(np.asarray(loss).ravel())
        self.norm.append(np.asarray(norm).ravel())
        self.lr.append(lr.ravel())


def cosine(step: np.ndarray | int, last: int) -> Any:
    """Half a cosine from 1 at step 0 to 0 at step `last`."""
    return 0.5 * (1 + np.cos(math.pi * np.asarray(step) / max(last, 1)))


def evaluate_ttt(
    config: ModelConfig,
    params: dict[str, Any],
    tokens: np.ndarray,
    tables: ByteTables,
    *,
    seq_len: int,
    mesh: Mesh,
    eval: EvalConfig,
    max_targets: int = 0,
    keep_scores: bool = False,
    log: Log | None = None,
) -> tuple[Result, Params]:
    """Score the validation stream with test-time training (`eval.ttt`); returns the result and the weights afterwards.

    params: dequantized weights in their storage dtypes (bfloat16 tables stay bfloat16); not changed. Other arguments as in
    `evaluate_standard`. Raises GolfError if `eval.ttt.kind` is off or a chunk holds no whole sequence.
    """
    ttt = eval.ttt
    if ttt.kind == "off":
        raise GolfError("eval.ttt.kind is 'off': this recipe has no test-time training; use --mode sliding")
    if not eval.stride:
        raise GolfError("eval.stride is 0: test-time training scores with a sliding window; give --stride")
    if ttt.kind == "score_first" and ttt.chunk_tokens < seq_len:
        raise GolfError(f"eval.ttt.chunk_tokens {ttt.chunk_tokens} is less than one sequence of {seq_len}")
    used = truncate(tokens, seq_len, max_targets)
    run = _Run(config, params, used, tables, seq_len, mesh, eval, keep_scores, log)
    for _ in run.score_first() if ttt.kind == "score_first" else run.adapt_first():
        pass
    return run.result(share_of(tokens, used, seq_len)), run.trainer.state.params


class _Run:
    """One evaluation with test-time training."""

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        tokens: np.ndarray,
        tables: ByteTables,
        seq_len: int,
        mesh: Mesh,
        eval: EvalConfig,
        keep_scores: bool,
        log: Log | None,
    ) -> None:
        begin = time.perf_counter()
        ttt, targets = eval.ttt, len(tokens) - 1
        self.ttt, self.tokens, self.seq_len, self.targets = ttt, tokens, seq_len, targets
        self.log = log or (lambda line: None)
        chunked = ttt.kind == "score_first"
        if chunked:
            self.windows, self.chunk_of = chunk_windows(eval.windows, targets, seq_len, eval.stride, ttt.chunk_tokens)
            self.chunks = -(-targets // ttt.chunk_tokens)
            sequences, epochs = min(ttt.chunk_tokens, targets) // seq_len, ttt.epochs
        else:
            self.windows = sliding_windows(eval.windows, targets, seq_len, eval.stride)
            self.chunk_of, self.chunks = np.zeros(len(self.windows), np.int64), 1
            sequences, epochs = targets // seq_len, 1
        self.ledger = Ledger(tokens, tables, self.chunks, keep_scores)
        self.trainer = Trainer(config, params, ttt, mesh, sequences, seq_len, epochs, eval.batch_rows)
        self.scorer = WindowScorer(
            config,
            shapes_of(self.trainer.state.params),
            mesh,
            self.ledger,
            self.windows,
            seq_len=seq_len,
            stride=eval.stride,
            rows=eval.batch_rows,
            chunk_of=self.chunk_of,
        )
        self.seconds = {"compile": time.perf_counter() - begin, "score": 0.0, "train": 0.0}

    def _timed(self, phase: str, action: Any, *args: Any) -> None:
        begin = time.perf_counter()
        action(*args)
        self.seconds[phase] += time.perf_counter() - begin

    def _project(self, done: float) -> None:
        spent = self.seconds["score"] + self.seconds["train"]
        self.log(f"ttt: {100 * done:.0f}% in {spent:.1f} s, {spent / done:.0f} s projected")

    def score_first(self) -> Iterator[None]:
        """Chunk c is scored with what chunks 0..c-1 taught; the last chunk is never trained on."""
        ttt, last = self.ttt, self.chunks - 1
        for c in range(self.chunks):
            self._timed("score", self.scorer.run, self.trainer.state.params, self.windows[self.chunk_of == c], c)
            if c < last:
                first, count = c * ttt.chunk_tokens, ttt.chunk_tokens // self.seq_len * self.seq_len
                self.ledger.update(first, first + count, self.trainer.steps)
                lr = np.full((ttt.epochs, len(self.trainer.plan.sequence)), ttt.lr * cosine(c, last))
                self._timed("train", self.trainer.train, self.trainer.prepare(self.tokens, first), lr)
            if c == -(-self.chunks // 100) or c == self.chunks // 2:
                self._project((c + 1) / self.chunks)
            yield

    def adapt_first(self) -> Iterator[None]:
        """Epochs over everything, then one sliding evaluation. Illegal (C3)."""
        ttt, trainer = self.ttt, self.trainer
        steps = len(trainer.plan.sequence)
        rows = trainer.prepare(self.tokens, 0)
        for epoch in range(ttt.epochs):
            self.ledger.update(0, self.targets, steps)
            lr = ttt.lr * cosine(np.arange(epoch * steps, (epoch + 1) * steps), ttt.epochs * steps)
            self._timed("train", trainer.train, rows, lr[None])
            if epoch == 0:
                self.log(f"ttt: 1 of {ttt.epochs} epochs in {self.seconds['train']:.1f} s")
            yield
        self._timed("score", self.scorer.run, trainer.state.params, self.windows)
        yield

    def result(self, share: float) -> Result:
        score, chunks = self.ledger.totals()
        empty = [np.zeros(0)]
        loss, norm, lr = (np.concatenate(x or empty) for x in (self.trainer.loss, self.trainer.norm, self.trainer.lr))
        trace = Trace(chunks, loss, norm, lr, tuple(self.ledger.order))
        return Result("ttt", score, self.ledger.facts(), self.seconds, share, trace, self.ledger.scores)

"""Training on the stream that is scored: what the methods of test-time training share.

The ranks of the record runs exist here as weights only: the mean over ranks of each rank's mean loss is one weighted sum over
sequences, so any number of devices gives the same score.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from golf_jax.ahead import kept
from golf_jax.config import ModelConfig, TTTConfig
from golf_jax.evaluation.score import Result, Trace
from golf_jax.evaluation.scorebook import ScoreBook
from golf_jax.evaluation.scorer import Shapes, avals, gather, shapes_of
from golf_jax.evaluation.stream import Stream
from golf_jax.mesh import AXIS, REPLICATED, put, replicate, replicated
from golf_jax.model import Model, nll
from golf_jax.optim.optimizer import norm_clip_factor, squared_norm

STEP_ROWS = PartitionSpec(None, AXIS)  # [steps, rows, ...]

Params = dict[str, jax.Array]


class TTTState(NamedTuple):
    """What an update changes; donated to every call and never leaves the devices."""

    params: Params
    opt: Any


@dataclass(frozen=True)
class Plan:
    """Which sequences each step of one epoch takes, [steps, rows], and what they weigh in their rank's loss, [steps, rows, ranks]."""

    sequence: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, sequences: int, ttt: TTTConfig, devices: int, micro: int) -> "Plan":
        """Contiguous share per rank, `batch_rows` of it per step. A sequence weighs 1 / (its rank's rows * ranks in that step) in its
        own rank's loss; spare rows weigh nothing."""
        every, bounds = np.arange(sequences), np.arange(ttt.ranks + 1) * sequences // ttt.ranks
        rank = np.searchsorted(bounds, every, side="right") - 1
        step = (every - bounds[rank]) // ttt.batch_rows
        count = np.zeros((step.max() + 1, ttt.ranks), np.int64)
        np.add.at(count, (step, rank), 1)
        local = -(-count.sum(1).max() // devices)
        local = -(-local // min(local, micro)) * min(local, micro)
        sequence, weight = np.zeros((len(count), local * devices), np.int64), np.zeros((len(count), local * devices, ttt.ranks), np.float32)
        for k, of_ranks in enumerate(count):
            rows = np.arange(of_ranks.sum())
            sequence[k, rows] = taken = every[step == k]
            weight[k, rows, rank[taken]] = 1 / (of_ranks[rank[taken]] * np.count_nonzero(of_ranks))
        return cls(sequence, weight)

    def tokens(self, tokens: np.ndarray, first: int, seq_len: int) -> np.ndarray:
        """uint16 [steps, rows, T + 1]: sequences that begin at token `first`."""
        start = (first + self.sequence * seq_len).reshape(-1)
        rows = gather(tokens, start, np.full_like(start, seq_len), seq_len, len(start))
        return rows.reshape(*self.sequence.shape, seq_len + 1)


@dataclass(frozen=True)
class Rule:
    """How an update moves the weights. Hashed by the identity of `direction`: make one per configuration and keep it."""

    direction: optax.GradientTransformation
    clip_norm: float
    """Largest global gradient norm; 0: no clipping."""
    fake_quant: bool = False
    """Fake quantization in the training forwards."""
    scales: tuple[tuple[str, float], ...] = ()
    """Factor of the learning rate by leaf; 1 for others."""


def initial_state(rule: Rule, params: Params) -> TTTState:
    """New buffers, which may be donated while the caller keeps its own."""
    return TTTState(jax.tree.map(jnp.copy, params), rule.direction.init(params))


def update(rule: Rule, state: TTTState, grads: Params, lr: Any) -> tuple[TTTState, jax.Array]:
    """One optimizer step: (new state, global gradient norm before clipping)."""
    norm, factor = norm_clip_factor(squared_norm(grads), rule.clip_norm or jnp.inf)
    grads = {n: (g * factor).astype(g.dtype) for n, g in grads.items()}
    direction, opt_state = rule.direction.update(grads, state.opt)
    scales = dict(rule.scales)

    def move(name: str, p: jax.Array) -> jax.Array:
        d32 = jnp.asarray(direction[name], jnp.float32)  # pyright: ignore[reportIndexIssue, reportArgumentType, reportCallIssue]
        return (p.astype(jnp.float32) - lr * scales.get(name, 1.0) * d32).astype(p.dtype)

    return TTTState({n: move(n, p) for n, p in state.params.items()}, opt_state), norm


@kept(8)
def training_program(
    config: ModelConfig, rule: Rule, mesh: Mesh, shapes: Shapes, rows: tuple[int, int, int], seq_len: int, epochs: int, micro: int
) -> jax.stages.Compiled:
    """Compiled (state, tokens uint16 [steps, rows, T + 1], weight [steps, rows, ranks], lr [epochs, steps]) -> (state, loss, norm).

    loss [epochs, steps, ranks], whose sum over the ranks is minimised, and norm [epochs, steps]: before each update and before clipping.
    All epochs of a chunk are one scan; state is donated.
    rows: (steps, rows, ranks) of the plan. micro: rows per device and forward pass. Kept for the process.
    """
    strength = 1.0 if rule.fake_quant else None

    def loss_fn(params: Params, tokens_BT: jax.Array, weight_BR: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens_BT = tokens_BT.astype(jnp.int32)
        nll_BT = nll(config, params, tokens_BT[:, :-1], tokens_BT[:, 1:], fake_quant=strength)
        loss_R = jnp.sum(jnp.mean(nll_BT, -1)[:, None] * weight_BR, 0)
        return jnp.sum(loss_R), loss_R

    def gradient(params: Params, tokens_BT: jax.Array, weight_BR: jax.Array) -> tuple[jax.Array, Params]:
        """Weighted losses by rank and the gradient of their sum over this device's rows, `micro` at a time, float32."""

        def one(total: tuple[jax.Array, Params], batch: tuple[jax.Array, jax.Array]):
            (_, loss_R), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *batch)
            return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, (loss_R, grads)), None

        zeros = (jnp.zeros(rows[2], jnp.float32), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
        size = min(micro, len(weight_BR))
        parts = tokens_BT.reshape(-1, size, seq_len + 1), weight_BR.reshape(-1, size, rows[2])
        if len(parts[0]) == 1:
            return one(zeros, (parts[0][0], parts[1][0]))[0]
        return jax.lax.scan(one, zeros, parts)[0]

    def step(state: TTTState, inputs: tuple[jax.Array, jax.Array, jax.Array]):
        tokens_BT, weight_BR, lr = inputs
        loss, grads = jax.lax.psum(gradient(state.params, tokens_BT, weight_BR), AXIS)
        grads = {n: g.astype(state.params[n].dtype) for n, g in grads.items()}
        state, norm = update(rule, state, grads, lr)
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
    tokens = jax.ShapeDtypeStruct((*rows[:2], seq_len + 1), jnp.uint16, sharding=split)
    weight = jax.ShapeDtypeStruct(rows, jnp.float32, sharding=split)
    lr = jax.ShapeDtypeStruct((epochs, rows[0]), jnp.float32, sharding=whole)
    state = jax.eval_shape(functools.partial(initial_state, rule), avals(mesh, shapes))
    on_mesh = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)
    return jax.jit(sharded, donate_argnums=0).lower(on_mesh, tokens, weight, lr).compile()


def program_of(model: Model, stream: Stream, mesh: Mesh, rule: Rule, plan: Plan, epochs: int) -> tuple[Any, ...]:
    """Arguments of `training_program`. Of the parameters only shapes and dtypes count."""
    return model.config, rule, mesh, shapes_of(model.params), plan.weight.shape, stream.seq_len, epochs, stream.batch_rows(mesh)


class Adapter:
    """Trains a model on sequences of a stream: owns the changed weights, and keeps losses, norms and learning rates of every step."""

    def __init__(self, model: Model, stream: Stream, mesh: Mesh, config: TTTConfig, rule: Rule, sequences: int, epochs: int) -> None:
        """sequences: trained on per epoch; epochs: per call of `train`."""
        self.stream, self.mesh, self.epochs = stream, mesh, epochs
        self.plan = Plan.of(sequences, config, mesh.shape[AXIS], stream.batch_rows(mesh))
        self.weight = put(mesh, self.plan.weight, STEP_ROWS)
        params = replicate(mesh, model.params)
        self.program = training_program(*program_of(model, stream, mesh, rule, self.plan, epochs))
        self.state: TTTState = jax.jit(functools.partial(initial_state, rule), out_shardings=replicated(mesh))(params)
        self.loss: list[np.ndarray] = []
        self.norm: list[np.ndarray] = []
        self.lr: list[np.ndarray] = []

    @property
    def params(self) -> Params:
        """The weights as they are now; the next `train` gives their memory away."""
        return self.state.params

    @property
    def steps(self) -> int:
        """Optimizer steps of one call."""
        return self.epochs * len(self.plan.sequence)

    def prepare(self, first: int) -> jax.Array:
        """The sequences from token `first` on, on the devices."""
        return put(self.mesh, self.plan.tokens(self.stream.tokens, first, self.stream.seq_len), STEP_ROWS)

    def train(self, tokens: jax.Array, lr: np.ndarray) -> None:
        """All epochs of one call; lr: [epochs, steps]. Waits for the result."""
        lr_ES = put(self.mesh, lr.astype(np.float32), REPLICATED)
        self.state, loss, norm = self.program(self.state, tokens, self.weight, lr_ES)
        self.loss.append(np.asarray(loss).reshape(self.steps, -1))
        self.norm.append(np.asarray(norm).ravel())
        self.lr.append(lr.ravel())

    def result(self, name: str, book: ScoreBook, seconds: dict[str, float]) -> Result:
        """What method `name` returns, once all is scored."""
        score, chunks = book.totals()
        norm, lr = (np.concatenate(x or [np.zeros(0)]) for x in (self.norm, self.lr))
        shares = np.resize(self.plan.weight.sum(1), (len(lr), self.plan.weight.shape[-1]))  # of each rank in every step's loss
        by_rank = np.concatenate([np.zeros((0, shares.shape[1])), *self.loss])
        means = np.divide(by_rank, shares, out=np.zeros_like(by_rank), where=shares > 0)
        trace = Trace(chunks, by_rank.sum(1), norm, lr, self.params, tuple(book.order), means)
        return Result(name, score, book.facts(), seconds, book.stream.share, trace, book.scores)


def cosine(step: np.ndarray | int, last: int) -> Any:
    """Half a cosine from 1 at step 0 to 0 at step `last`."""
    return 0.5 * (1 + np.cos(math.pi * np.asarray(step) / max(last, 1)))

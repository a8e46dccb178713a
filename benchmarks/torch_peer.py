"""A PyTorch peer of a golf_jax recipe, written from the specifications: what the JAX step is measured against.

Same parameters (names and orientation of the challenge), same batch, same mathematics, in the form a careful PyTorch user would
write: one module per layer, SDPA with grouped heads, `torch.compile`, Muon batched by matrix shape, fused AdamW, `_foreach` EMA.
Parts of PRs 372, 562 and 1182 that it lacks (fake quantization, trigrams, value embeddings, SWA, per-rank clip) are refused.
"""

import math
import pickle
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golf_jax.config import GolfError, GroupConfig, ModelConfig, Recipe

EPS = 1.1920929e-07
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def check_supported(recipe: Recipe) -> None:
    """Raise GolfError naming the first part of the recipe that the peer does not have."""
    m, o, s = recipe.model, recipe.optim, recipe.schedule
    absent = {
        "model.fake_quant.matrices": m.fake_quant.matrices != "none",
        "model.trigram": m.trigram != "off",
        "model.value_embed_layers": bool(m.value_embed_layers),
        "optim.clip_per_rank": o.clip_per_rank,
        "optim.decay_last": o.decay_last,
        "optim.groups (bf16_momentum)": any(g.bf16_momentum for g in o.groups),
        "optim.groups (newton_schulz_coefficients)": any(g.newton_schulz_coefficients != (NS_COEFFICIENTS,) for g in o.groups),
        "optim.groups (frozen)": any(g.kind == "frozen" for g in o.groups),
        "schedule.seq_lens": bool(s.seq_lens),
        "schedule.swa_every": s.swa_every > 0,
    }
    for field, wanted in absent.items():
        if wanted:
            raise GolfError(f"the PyTorch peer has no {field}: leave out --peer, or choose pr638, pr2005, baseline or quickstart")


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


class Linear(nn.Linear):
    """float32 weights used in the dtype of the activations."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        kv = c.num_kv_heads * c.head_dim
        self.c, self.layer = c, layer
        self.xsa = layer >= c.num_layers - c.xsa_last_n
        self.c_q = Linear(c.width, c.width + (c.num_heads if c.head_gate == "query_rows" else 0), bias=False)
        self.c_k, self.c_v = Linear(c.width, kv, bias=False), Linear(c.width, kv, bias=False)
        self.proj = Linear(c.width, c.width, bias=False)
        self.q_gain = nn.Parameter(torch.empty(c.num_heads))
        if c.value_residual:
            self.vr_lambda = nn.Parameter(torch.empty(2))
        if c.head_gate == "linear":
            self.attn_gate = Linear(c.width, c.num_heads)

    def forward(self, z: Tensor, v0: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        c = self.c
        b, t, _ = z.shape
        q = self.c_q(z)
        gate = q[..., c.width :] if c.head_gate == "query_rows" else None
        q = q[..., : c.width].reshape(b, t, c.num_heads, c.head_dim)
        k = self.c_k(z).view(b, t, c.num_kv_heads, c.head_dim)
        v = raw = self.c_v(z).view(b, t, c.num_kv_heads, c.head_dim)
        if c.value_residual:
            lam = self.vr_lambda.to(z.dtype)
            if v0 is not None:
                v = lam[0] * v0 + lam[1] * raw
            elif c.value_residual_first:
                v = (lam[0] + lam[1]) * raw
        q = rotate(rms_norm(q), cos, sin) * self.q_gain.to(z.dtype)[:, None]
        k = rotate(rms_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=c.num_heads != c.num_kv_heads
        ).transpose(1, 2)
        if self.xsa:
            grouped = y.reshape(b, t, c.num_kv_heads, -1, c.head_dim)
            unit = F.normalize(v.float(), dim=-1, eps=1e-12)[:, :, :, None]
            y = grouped - (grouped * unit).sum(-1, keepdim=True) * unit
        y = y.reshape(b, t, c.num_heads, c.head_dim)
        if c.head_gate == "linear":
            gate = self.attn_gate(z)
        if gate is not None:
            y = y * torch.sigmoid(gate)[..., None]
        return self.proj(y.reshape(b, t, -1).to(z.dtype)), raw


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first 2R dimensions of [B, T, H, K], half-split; cos, sin [T, 1, R]."""
    r = cos.shape[-1]
    a, b = x[..., :r], x[..., r : 2 * r]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, x[..., 2 * r :]), -1)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.slope = c.mlp_slope
        self.fc, self.proj = Linear(c.width, c.mlp_dim, bias=False), Linear(c.mlp_dim, c.width, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        u = self.fc(z)
        return self.proj((F.leaky_relu(u, self.slope) if self.slope else F.relu(u)).square())


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.attn, self.mlp = Attention(c, layer), MLP(c)
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.empty(c.width)) for _ in range(2))
        self.resid_mix = nn.Parameter(torch.empty(2, c.width))
        self.scale = (layer + 1) ** -0.5 if c.layer_scale else 1.0
        self.parallel = 0 <= c.parallel_from <= layer

    def forward(self, x: Tensor, x0: Tensor, v0: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        mix, dtype = self.resid_mix.to(x.dtype), x.dtype
        x = mix[0] * x + mix[1] * x0
        z = rms_norm(x) * self.scale
        a, v = self.attn(z, v0, cos, sin)
        x = x + self.attn_scale.to(dtype) * a
        if not self.parallel:
            z = rms_norm(x) * self.scale
        return x + self.mlp_scale.to(dtype) * self.mlp(z), v


class Bigram(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.buckets = c.bigram_buckets
        self.embed = nn.Embedding(c.bigram_buckets, c.bigram_dim)
        if c.bigram_dim != c.width:
            self.proj = Linear(c.bigram_dim, c.width, bias=False)
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        t = tokens.int()
        ids = torch.full_like(t, self.buckets - 1)
        ids[:, 1:] = ((36313 * t[:, 1:]) ^ (27191 * t[:, :-1])) % (self.buckets - 1)
        x = self.embed(ids).to(dtype)
        return (self.proj(x) if hasattr(self, "proj") else x) * self.scale.to(dtype)


class Smear(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(c.width))

    def forward(self, x: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate.to(x.dtype))
        return (1 - g) * x + g * F.pad(x, (0, 0, 1, -1))


class Model(nn.Module):
    """Tokens and targets [B, T] -> mean cross entropy, or the scores of the last targets. Parameter names are the challenge's."""

    def __init__(self, c: ModelConfig, seq_len: int, dtype: torch.dtype):
        super().__init__()
        self.c, self.dtype, self.looping = c, dtype, False
        self.tok_emb = nn.Embedding(c.vocab_size, c.width)
        if c.bigram_buckets:
            self.bigram = Bigram(c)
        if c.smear_gate:
            self.smear = Smear(c)
        self.skip_weights = nn.Parameter(torch.empty(c.num_skips, c.width))
        if c.skip == "gated":
            self.skip_gates = nn.Parameter(torch.empty(c.num_skips, c.width))
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.num_layers))
        dims, base = c.rope_dims or c.head_dim, c.rope_base
        if c.rope_train_len and seq_len > c.rope_train_len:
            base *= (seq_len / c.rope_train_len) ** (dims / (dims - 2))
        inv_freq = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        if c.rope_bf16_frequencies:
            inv_freq = inv_freq.bfloat16().float()
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), inv_freq)[:, None]
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def logits(self, tokens: Tensor) -> Tensor:
        c = self.c
        x = self.tok_emb(tokens).to(self.dtype)
        if c.bigram_buckets:
            x = x + self.bigram(tokens, self.dtype)
        x = rms_norm(x)
        if c.smear_gate:
            x = self.smear(x)
        x0, v0, skips = x, None, []
        encoder, decoder = c.layer_order(self.looping)
        for step, layer in enumerate(encoder + decoder):
            j = step - len(encoder)
            if 0 <= j < c.num_skips and skips:
                scaled = self.skip_weights[j].to(self.dtype) * skips.pop()
                if c.skip == "gated":
                    g = torch.sigmoid(self.skip_gates[j].to(self.dtype))
                    x = g * x + (1 - g) * scaled
                else:
                    x = x + scaled
            x, v = self.blocks[layer](x, x0, v0, self.cos, self.sin)
            v0 = v if v0 is None else v0
            if j < 0:
                skips.append(x)
        logits = F.linear(rms_norm(x), self.tok_emb.weight.to(self.dtype))
        return c.softcap * torch.tanh(logits / c.softcap)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(tokens).float().view(-1, self.c.vocab_size), targets.reshape(-1))

    def scores(self, tokens: Tensor, targets: Tensor, last: int) -> Tensor:
        """nll [B, last] of the last targets, from the logits of all positions: how the records' code scores a window."""
        every = F.cross_entropy(self.logits(tokens).float().flatten(0, 1), targets.flatten(), reduction="none")
        return every.view(targets.shape)[:, -last:]


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Approximate orthogonal factor of each matrix of [G, m, n], m <= n."""
    a, b, c = NS_COEFFICIENTS
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@dataclass
class MuonBatch:
    """All matrices of one shape up to transposition, with their momentum [G, small, large]."""

    params: list[Tensor]
    group: GroupConfig
    momentum: Tensor


class Trainer:
    """Model and optimizer of a recipe. `step` is one full training step on a batch that is already on the device.

    tensors: parameters by the challenge's names (golf_jax.model.to_tensors), float32. device: `cpu` or `cuda`.
    compile: torch.compile the forward and backward pass and Newton-Schulz.
    """

    def __init__(self, recipe: Recipe, tensors: Mapping[str, np.ndarray], roles: Mapping[str, str], device: str, compile: bool):
        check_supported(recipe)
        self.recipe = recipe
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.model.dtype]
        self.low = torch.bfloat16 if recipe.numerics == "as_run" else torch.float32
        self.model = Model(recipe.model, recipe.data.seq_len, dtype).to(device)
        self.model.load_state_dict({name: torch.from_numpy(np.array(t)) for name, t in tensors.items()})
        if recipe.numerics == "as_run":
            bf16 = {"tok_emb": self.model.tok_emb, "bigram_table": getattr(self.model, "bigram", self.model.tok_emb)}
            for name in recipe.model.bf16_params:
                module = bf16[name]
                (module.embed if isinstance(module, Bigram) else module).to(torch.bfloat16)
        named = dict(self.model.named_parameters())
        groups = {role: g for g in recipe.optim.groups for role in g.roles}
        by_group: dict[GroupConfig, list[str]] = {}
        for name in named:
            by_group.setdefault(groups[roles[name]], []).append(name)
        adam = [
            {
                "params": [named[n] for n in names],
                "lr": g.lr,
                "base_lr": g.lr,
                "weight_decay": g.weight_decay,
                "betas": g.betas,
                "eps": g.eps,
            }
            for g, names in by_group.items()
            if g.kind == "adamw"
        ]
        self.adam = torch.optim.AdamW(adam, fused=True)
        self.muon = [b for g, names in by_group.items() if g.kind == "muon" for b in _batches([named[n] for n in names], g)]
        self.params = list(named.values())
        self.ema = [p.detach().float().clone() for p in self.params] if recipe.schedule.ema_decay else []
        self.loss, self.scores, self.newton_schulz = self.model, self.model.scores, newton_schulz
        if compile:
            self.loss, self.scores, self.newton_schulz = (
                torch.compile(f, dynamic=False) for f in (self.model, self.model.scores, newton_schulz)
            )

    def step(self, x: Tensor, y: Tensor, lr_factor: float, momentum: float, rows: int) -> Tensor:
        """One step on int64 [sequences, T] in micro-batches of `rows`; returns the mean loss before the update."""
        count = x.shape[0] // rows
        total = torch.zeros((), device=x.device)
        for i in range(count):
            loss = self.loss(x[i * rows : (i + 1) * rows], y[i * rows : (i + 1) * rows]) / count
            loss.backward()
            total += loss.detach()
        if self.recipe.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.params, self.recipe.optim.clip_norm, foreach=True)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        self.adam.step()
        with torch.no_grad():
            for batch in self.muon:
                self._muon(batch, lr_factor, momentum)
            if self.ema:
                now = [p.detach().float() for p in self.params]
                torch._foreach_lerp_(self.ema, now, 1 - self.recipe.schedule.ema_decay)
        for p in self.params:
            p.grad = None
        return total

    def adapt(self, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int, rows: int, clip_norm: float) -> None:
        """Test-time training: in each epoch one update on all of int64 [sequences, T], in micro-batches of `rows`."""
        for _ in range(epochs):
            for some, targets in zip(x.split(rows), y.split(rows), strict=True):
                (self.loss(some, targets) * (len(some) / len(x))).backward()
            torch.nn.utils.clip_grad_norm_(self.params, clip_norm, foreach=True)
            optimizer.step()
            optimizer.zero_grad()

    def _muon(self, batch: MuonBatch, lr_factor: float, momentum: float) -> None:
        grads = torch.stack([_wide(p.grad) for p in batch.params])  # type: ignore[arg-type]
        batch.momentum.mul_(momentum).add_(grads)
        u = grads.add_(batch.momentum, alpha=momentum)
        if batch.group.row_normalize:
            tall = torch.tensor([p.shape[0] > p.shape[1] for p in batch.params], device=u.device)[:, None, None]
            u = u / torch.where(tall, u.norm(dim=-2, keepdim=True), u.norm(dim=-1, keepdim=True)).clamp_min(1e-7)
        directions = self.newton_schulz(u.to(self.low), batch.group.newton_schulz_steps)
        lr = batch.group.lr * lr_factor
        torch._foreach_mul_(batch.params, 1 - lr * batch.group.weight_decay)
        for p, d in zip(batch.params, directions.unbind(), strict=True):
            rows, cols = p.shape
            p.add_(d.mT if rows > cols else d, alpha=-lr * math.sqrt(max(1.0, rows / cols)))


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.shape[0] > x.shape[1] else x


def _batches(params: list[Tensor], group: GroupConfig) -> list[MuonBatch]:
    shapes: dict[tuple[int, ...], list[Tensor]] = {}
    for p in params:
        shapes.setdefault(tuple(sorted(p.shape)), []).append(p)
    return [MuonBatch(ps, group, torch.zeros((len(ps), *shape), device=ps[0].device)) for shape, ps in shapes.items()]


def serve() -> None:
    """Run as a process of its own, driven by `Peer`: pickled job on stdin, one pickled answer per step on stdout.

    A job with `last` scores the last targets of the batch instead of training on it; its answers hold the scores. One with `chunks` scores
    and then adapts to one chunk per step, `rows` windows or sequences at a time.
    A process apart keeps the thread pools and GPU memory pools of the two frameworks from counting against each other.
    """
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    job = pickle.load(sys.stdin.buffer)
    trainer = Trainer(job["recipe"], job["tensors"], job["roles"], job["device"], job["compile"])
    trainer.model.looping = job["looping"]
    chunks = iter(job.get("chunks", ()))
    sgd = torch.optim.SGD(trainer.params, **job["sgd"]) if "chunks" in job else None

    def device(tokens: np.ndarray) -> Tensor:
        return torch.from_numpy(tokens).long().to(job["device"])

    def chunk(windows: np.ndarray, sequences: np.ndarray) -> dict:
        windows_BT, sequences_BT, begin = device(windows), device(sequences), time.perf_counter()
        with torch.no_grad():
            parts = [trainer.scores(part[:, :-1], part[:, 1:], job["last"]).cpu() for part in windows_BT.split(job["rows"])]
        scored = time.perf_counter()
        trainer.adapt(sgd, sequences_BT[:, :-1], sequences_BT[:, 1:], job["epochs"], job["rows"], job["clip_norm"])
        trainer.params[0].sum().item()  # waits for the device
        return {"scores": torch.cat(parts).numpy(), "score_s": scored - begin, "train_s": time.perf_counter() - scored}

    x, y = (None, None) if sgd else (device(job["x"]), device(job["y"]))

    def work() -> dict:  # any answer waits for the device
        if sgd:
            return chunk(*next(chunks))
        if "last" not in job:
            return {"loss": trainer.step(x, y, job["lr_factor"], job["momentum"], job["rows"]).item()}
        with torch.no_grad():
            return {"scores": trainer.scores(x, y, job["last"]).cpu().numpy()}

    while pickle.load(sys.stdin.buffer) == "step":
        wall, cpu = time.perf_counter(), time.process_time()
        answer = work()
        answer |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "version": torch.__version__}
        if job["device"] == "cuda":
            answer["peak_bytes"] = torch.cuda.max_memory_allocated()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()

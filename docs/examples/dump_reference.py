"""A reference set from a PyTorch script: weights, forward pass, gradients and three steps of training of a small variant.

    python docs/examples/dump_reference.py OUT && python -m golf_jax.reproduce OUT

Replace `forward` by your model (CPU, float32, small width); the recipe file says in this project's terms what it is.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

RECIPE = """
from golf_jax.config import *

def recipe():
    roles = ("matrix", "proj", "gate", "token", "table", "vector")
    return Recipe("mine", ModelConfig(vocab_size=64, num_layers=2, width=32, num_heads=4, num_kv_heads=2, mlp_ratio=2.0, dtype="float32"),
        DataConfig(seq_len=16, ranks=1, rows_per_rank=2), OptimConfig((GroupConfig("all", roles, "adamw", 0.01, 0.1),), clip_norm=0.0),
        BudgetConfig(steps=3), ScheduleConfig(warmdown_steps=0, ema_decay=0.0, export="raw"),
        eval=EvalConfig(sliding=SlidingConfig(stride=8)), numerics="fp32")
"""
V, L, D, H, G, K = 64, 2, 32, 4, 2, 8


def forward(p, tokens):
    """Logits [B, T, V]: pre-norm blocks with a U-Net skip from layer 0 into layer 1, grouped-query attention, squared ReLU, tied head."""
    norm = lambda x: F.rms_norm(x, x.shape[-1:])  # noqa: E731
    angle = torch.outer(torch.arange(tokens.shape[1]), 10_000.0 ** (-torch.arange(0, K, 2) / K))
    turn = lambda a, b: torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1)  # noqa: E731
    x = x0 = skip = norm(p["tok_emb.weight"][tokens])
    for i in range(L):
        w = {n.removeprefix(f"blocks.{i}."): t for n, t in p.items()}
        x = x if i == 0 else x + p["skip_weights"][0] * skip
        x = w["resid_mix"][0] * x + w["resid_mix"][1] * x0
        heads = lambda name, n, z=norm(x), w=w: (z @ w[name].T).unflatten(-1, (n, K)).transpose(1, 2)  # noqa: E731, B008
        q, k, v = (heads(f"attn.{name}.weight", n) for name, n in (("c_q", H), ("c_k", G), ("c_v", G)))
        q, k = (turn(*norm(z).chunk(2, -1)) for z in (q, k))
        q = q * w["attn.q_gain"][:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        x = x + w["attn_scale"] * (y @ w["attn.proj.weight"].T)
        x = x + w["mlp_scale"] * (F.relu(norm(x) @ w["mlp.fc.weight"].T).square() @ w["mlp.proj.weight"].T)
        skip = x
    return 30 * torch.tanh(norm(x) @ p["tok_emb.weight"].T / 30)


def main(out):
    torch.manual_seed(0)
    shapes = {"tok_emb.weight": (V, D), "skip_weights": (1, D)}
    block = {"attn_scale": (D,), "mlp_scale": (D,), "resid_mix": (2, D), "attn.q_gain": (H,), "attn.c_q.weight": (D, D)}
    block |= {"attn.c_k.weight": (G * K, D), "attn.c_v.weight": (G * K, D), "attn.proj.weight": (D, D)}
    block |= {"mlp.fc.weight": (2 * D, D), "mlp.proj.weight": (D, 2 * D)}
    shapes |= {f"blocks.{i}.{n}": s for i in range(L) for n, s in block.items()}
    p = {n: (torch.randn(s) / s[-1] ** 0.5 + (len(s) == 1)).requires_grad_() for n, s in shapes.items()}  # zeros would hide mistakes
    loss_of = lambda t: F.cross_entropy(forward(p, t[:, :-1]).flatten(0, 1), t[:, 1:].flatten())  # noqa: E731
    tokens = torch.randint(0, V, (3, 2, 17))

    start = {f"main/{n}": t.detach().clone() for n, t in p.items()}
    loss = loss_of(tokens[0])
    loss.backward()
    model = {"main/tokens": tokens[0], "main/logits": forward(p, tokens[0, :, :-1]), "main/loss": loss}
    grads = {f"main/grad/{n}": t.grad.clone() for n, t in p.items()}
    opt, losses = torch.optim.AdamW(p.values(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), []
    for step in tokens:
        opt.zero_grad()
        losses.append(loss_of(step))
        losses[-1].backward()
        opt.step()
    train = {"main/tokens": tokens[:, None], "main/loss": torch.stack(losses)} | {f"main/after/3/{n}": t for n, t in p.items()}

    out.mkdir(parents=True, exist_ok=True)
    for section, arrays in {"params": start, "model": model, "grads": grads, "train": train}.items():
        np.savez_compressed(out / f"{section}.npz", **{n: x.detach().numpy() for n, x in arrays.items()})
    bar = lambda measure, value: {"measure": measure, "value": value}  # noqa: E731
    sections = {
        "params": {"cases": {"main": {}}},
        "model": {"tolerances": {"logits": bar("abs", 1e-4), "loss": bar("abs", 1e-5)}, "cases": {"main": {}}},
        "grads": {"tolerances": {"grad": bar("rel L2", 1e-3)}, "cases": {"main": {"inputs": "model/main"}}},
        "train": {"tolerances": {"loss": bar("abs", 1e-4), "after": bar("rel L2", 1e-3)}, "cases": {"main": {}}},
    }
    about = {"format": 1, "recipe": "mine.py", "made": {"from": "dump_reference.py"}, "hyperparameters": {}, "config": {}}
    (out / "mine.py").write_text(RECIPE)
    (out / "reference.json").write_text(json.dumps(about | {"sections": sections}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

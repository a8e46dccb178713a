"""Newton-Schulz, Muon on joined stacks, and the same numbers on eight devices as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golf_jax.config import GolfError, GroupConfig, OptimConfig
from golf_jax.mesh import AXIS, REPLICATED, ROWS, make_mesh
from golf_jax.optim import StackLayout, make_optimizer, newton_schulz
from golf_jax.optim.optimizer import group_scalars, route

SHAPES = {"wide": (3, 8, 16), "tall": (5, 16, 8), "square": (2, 8, 8), "proj": (8, 12), "vector": (3, 8), "scalar": ()}
ROLES = dict.fromkeys(("wide", "tall", "square"), "matrix") | {"proj": "proj", "vector": "vector", "scalar": "vector"}


def config(row_normalize=False, **changes):
    groups = (
        GroupConfig("matrix", ("matrix", "proj"), "muon", 0.02, 0.1, momentum=0.9, momentum_warmup_steps=0, row_normalize=row_normalize),
        GroupConfig("vector", ("vector",), "adamw", 0.01, 0.05),
    )
    return OptimConfig(groups=groups, **changes)


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()}


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 16)])
def test_newton_schulz_flattens_the_singular_values(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    values = np.linalg.svd(np.asarray(newton_schulz(jnp.asarray(x), 5, jnp.float32)), compute_uv=False)
    assert values.min() > 0.3 and values.max() < 1.4
    np.testing.assert_array_equal(newton_schulz(jnp.zeros((4, 6))), 0)


def test_newton_schulz_of_a_transpose_is_the_transpose():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((10, 6)), jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(newton_schulz(x, 5, dtype).T, newton_schulz(x.T, 5, dtype))


def test_layout_joins_equal_shapes_up_to_transposition_and_pads():
    layout = StackLayout.of({n: SHAPES[n] for n in ("wide", "tall", "square", "proj")}, dict.fromkeys(SHAPES, jnp.dtype("float32")), 4)
    assert sorted(tuple(m.name for m in b) for b in layout.batches.values()) == [("proj",), ("square",), ("wide", "tall")]
    tree = random_tree(2)
    packed = layout.pack(tree)
    assert all(len(stack) % 4 == 0 for stack in packed.values())
    back = layout.unpack(packed)
    for name in back:
        np.testing.assert_array_equal(back[name], tree[name])


@pytest.mark.parametrize("row_normalize", [False, True])
@pytest.mark.parametrize("decay_last", [False, True])
def test_one_step_is_the_formula(row_normalize, decay_last):
    """Momentum, Nesterov, optional rows, Newton-Schulz, sqrt(out/in), decay, written out for one matrix (out, in)."""
    opt_config = config(row_normalize=row_normalize, decay_last=decay_last, clip_norm=0.0)
    params, grads = random_tree(3), random_tree(4)
    opt = make_optimizer(opt_config, params, ROLES)
    updates, _, _ = opt.update(grads, opt.init(params), params, lr_factor=0.5, groups=group_scalars(opt_config, 0), clip_norm=jnp.inf)
    lr, decay = 0.02 * 0.5, 0.1
    for name in ("wide", "tall"):
        w, g = np.asarray(params[name][1]).T, np.asarray(grads[name][1]).T
        u = g + 0.9 * g
        if row_normalize:
            u = u / np.linalg.norm(u, axis=1, keepdims=True)
        direction = np.asarray(newton_schulz(jnp.asarray(u), 5, jnp.float32)) * max(1, w.shape[0] / w.shape[1]) ** 0.5
        want = (w - lr * direction) * (1 - lr * decay) if decay_last else w * (1 - lr * decay) - lr * direction
        np.testing.assert_allclose(np.asarray(params[name] + updates[name])[1].T, want, atol=2e-6)


def test_clipping_acts_on_the_norm_of_all_gradients():
    params, grads = random_tree(5), random_tree(6)
    opt = make_optimizer(config(), params, ROLES)
    norm = np.sqrt(sum(np.square(g).sum() for g in grads.values()))
    _, state, found = opt.update(grads, opt.init(params), params, lr_factor=1.0, groups=group_scalars(config(), 0), clip_norm=0.3)
    np.testing.assert_allclose(found, norm, rtol=1e-6)
    moment = state["vector"].mu["vector"]
    np.testing.assert_allclose(moment, 0.1 * grads["vector"] * 0.3 / (norm + 1e-6), rtol=1e-5)


@pytest.mark.parametrize("numerics", ["fp32", "as_run"])
def test_eight_devices_give_what_one_device_gives(numerics):
    """Reduce-scatter, each device's share of the matrices, all-gather: with padding (10 matrices of 8x16 on 8 devices)."""
    mesh, params = make_mesh(8), random_tree(7)
    shards = [random_tree(10 + r) for r in range(8)]
    mean = {n: sum(g[n] for g in shards) / 8 for n in params}
    alone = make_optimizer(config(row_normalize=True), params, ROLES, numerics=numerics)
    shared = make_optimizer(config(row_normalize=True), params, ROLES, numerics=numerics, shards=8, axis_name=AXIS)
    state = make_optimizer(config(row_normalize=True), params, ROLES, numerics=numerics, shards=8).init(params)
    assert shared.spec == {"matrix": ROWS, "vector": REPLICATED}
    traced = dict(lr_factor=1.0, groups=group_scalars(config(), 0), clip_norm=jnp.float32(0.3))

    def local(grads, state, params):
        grads = jax.tree.map(lambda g: g[0], grads)
        return shared.update(grads, state, params, **traced)

    step = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(ROWS, shared.spec, REPLICATED), out_specs=(REPLICATED, shared.spec, REPLICATED), check_vma=False
        )
    )
    stacked = {n: jnp.stack([g[n] for g in shards]) for n in params}
    one_state = alone.init(params)
    for _ in range(2):
        many, state, norm = step(stacked, state, params)
        one, one_state, one_norm = alone.update(mean, one_state, params, **traced)
        for name in params:
            np.testing.assert_allclose(many[name], one[name], atol=2e-6 if numerics == "fp32" else 2e-3, err_msg=name)
    np.testing.assert_allclose(norm, one_norm, rtol=1e-5)


def test_a_role_without_a_group_is_named():
    with pytest.raises(GolfError, match="no group claims role 'gate'.*parameter gate_weight"):
        route(config(), {"gate_weight": "gate"})


def test_a_role_in_two_groups_is_named():
    with pytest.raises(GolfError, match="role 'vector' is claimed by two groups"):
        OptimConfig(groups=(GroupConfig("a", ("vector",), "adamw"), GroupConfig("b", ("vector",), "muon")))


def test_frozen_groups_and_dead_layers_do_not_move():
    groups = (GroupConfig("matrix", ("matrix", "proj"), "frozen"), GroupConfig("vector", ("vector",), "adamw", 0.01, 0.5))
    params, grads = random_tree(8), random_tree(9)
    live = {"vector": jnp.asarray([[0.0], [1.0], [1.0]])}
    frozen = OptimConfig(groups=groups)
    opt = make_optimizer(frozen, params, ROLES, live=live)
    updates, _, _ = opt.update(grads, opt.init(params), params, lr_factor=1.0, groups=group_scalars(frozen, 0), clip_norm=jnp.inf)
    assert all(not np.any(updates[n]) for n in ("wide", "tall", "square", "proj"))
    assert not np.any(updates["vector"][0]) and np.all(updates["vector"][1:])


POLAR = ((8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316))


def test_coefficients_may_differ_from_step_to_step():
    """Two steps of the Polar Express (PR 2135), written out in float64."""
    x = np.random.default_rng(2).standard_normal((6, 10))
    want = x / np.linalg.norm(x)
    for a, b, c in POLAR:
        gram = want @ want.T
        want = a * want + (b * gram + c * gram @ gram) @ want
    ours = newton_schulz(jnp.asarray(x, jnp.float32), 2, jnp.float32, coefficients=POLAR)
    np.testing.assert_allclose(ours, want, atol=2e-5)


def test_every_group_has_its_own_settings():
    """Two Muon groups and two AdamW groups: each moves as it would alone."""
    settings = {
        "wide": GroupConfig("wide", ("wide",), "muon", 0.02, momentum=0.9, momentum_warmup_steps=0, newton_schulz_steps=2),
        "tall": GroupConfig("tall", ("tall",), "muon", 0.03, momentum=0.5, momentum_warmup_steps=0, row_normalize=True),
        "vector": GroupConfig("vector", ("vector",), "adamw", 0.01, betas=(0.8, 0.9), eps=0.5),
        "proj": GroupConfig("proj", ("proj",), "adamw", 0.01, 0.3),
    }
    params, grads = random_tree(3), random_tree(4)

    def move(names):
        tree = {n: params[n] for n in names}
        optim = OptimConfig(groups=tuple(settings[n] for n in names))
        opt = make_optimizer(optim, tree, {n: n for n in names})
        state = opt.init(tree)
        for _ in range(2):
            updates, state, _ = opt.update(grads, state, tree, lr_factor=1.0, groups=group_scalars(optim, 0), clip_norm=jnp.inf)
            tree = {n: tree[n] + updates[n] for n in names}
        return tree

    together = move(list(settings))
    for name in settings:
        np.testing.assert_array_equal(together[name], move([name])[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupConfig("a", ("x",), "adamw", momentum=0.5), "kind 'adamw' does not read momentum"),
        (lambda: GroupConfig("a", ("x",), "muon", eps=1e-6), "kind 'muon' does not read eps"),
        (lambda: GroupConfig("a", ("x",), "frozen", lr=0.1), "kind 'frozen' does not read lr"),
        (lambda: GroupConfig("a", ("x",), "adamw", betas=(0.9, 1.0)), "betas must be in 0..1 and below 1"),
        (lambda: GroupConfig("a", ("x",), "adamw", eps=0.0), "eps must be positive"),
        (lambda: GroupConfig("a", ("x",), "muon", newton_schulz_coefficients=POLAR), "one triple, or one for each of 5 steps, not 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(GolfError, match=message):
        make()

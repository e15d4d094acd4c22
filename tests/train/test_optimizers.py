import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.parallel.config import FSDP, Mesh
from jaxllm.parallel.sharding import make_mesh
from jaxllm.train.config import SGD, Adafactor, AdamW, Lion, Muon
from jaxllm.train.optimizers import build, decay_mask, is_matrix, state_axes

SIZES = {"layers": 3, "vocab": 12, "position": 6, "embed": 8, "heads": 4, "kv_heads": 2, "head_dim": 2, "mlp": 20}
AXES = {
    "embedding": ("vocab", "embed"),
    "head_bias": ("vocab",),
    "blocks.0.norm.scale": ("layers", "embed"),
    "blocks.0.attention.w_q": ("layers", "embed", "heads", "head_dim"),
    "blocks.0.attention.b_q": ("layers", "heads", "head_dim"),
    "blocks.0.attention.w_o": ("layers", "heads", "head_dim", "embed"),
    "tail.0.ffn.w_down": ("mlp", "embed"),
}
MORE_AXES = AXES | {
    "position": ("position", "embed"),
    "head": ("embed", "vocab"),
    "final_norm.scale": ("embed",),
    "blocks.0.attention.q_norm.scale": ("layers", "head_dim"),
    "blocks.0.attention.w_k": ("layers", "embed", "kv_heads", "head_dim"),
    "blocks.0.ffn.w_up": ("layers", "embed", "mlp"),
    "blocks.0.ffn.b_up": ("layers", "mlp"),
    "tail.0.attention.b_k": ("kv_heads", "head_dim"),
}
HIDDEN = {name for name in AXES if ".w_" in name}
DECAYED = HIDDEN | {"embedding"}

OPTIMIZERS = [
    AdamW(learning_rate=0.01),
    Adafactor(learning_rate=0.01, min_dim=4),
    Adafactor(learning_rate=0.01, min_dim=4, scale_by_parameter=True, clipping=0.5),
    Lion(learning_rate=0.01, weight_decay=0.1),
    SGD(learning_rate=0.01),
    SGD(learning_rate=0.01, momentum=0.0),
    Muon(learning_rate=0.01, adam=AdamW(learning_rate=0.02)),
]
IDS = ["adamw", "adafactor", "adafactor-scaled", "lion", "sgd", "plain-sgd", "muon"]
W, B = "tail.0.ffn.w_down", "head_bias"  # a matrix and a vector, neither stacked
every_optimizer = pytest.mark.parametrize("cfg", OPTIMIZERS, ids=IDS)


def normal(seed: int, axes=AXES) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=[SIZES[a] for a in ax]), jnp.float32) for name, ax in axes.items()}


def constant(cfg):
    return optax.constant_schedule(cfg.learning_rate)


@functools.cache
def compiled(cfg, axes: tuple):
    """Jitted init and step; runs of the same optimizer share the compilation."""
    tx = build(cfg, constant(cfg), dict(axes))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(tx.init), jax.jit(step)


def run(cfg, params, gradients: list, axes=AXES):
    """Params and state after an update for each of `gradients`."""
    init, step = compiled(cfg, tuple(axes.items()))
    state = init(params)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def test_weights_with_two_sides_decay_and_biases_of_heads_do_not():
    decayed = {name for name, decays in decay_mask(MORE_AXES).items() if decays}
    assert decayed == {name for name in MORE_AXES if name in ("embedding", "position", "head") or ".w_" in name}


def test_muon_takes_the_hidden_matrices_alone():
    assert {n for n in MORE_AXES if is_matrix(n, MORE_AXES)} == {n for n in MORE_AXES if ".w_" in n}


# --- properties of every optimizer ---------------------------------------------------------------------------------


@every_optimizer
def test_a_quadratic_falls(cfg):
    target = normal(1)
    tx = build(cfg.model_copy(update={"weight_decay": 0.0}), constant(cfg), AXES)

    def loss(params):
        return sum(jnp.mean((params[n] - target[n]) ** 2) * 10 for n in params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = normal(2)
    state, first = jax.jit(tx.init)(params), loss(params)
    for _ in range(150):
        params, state = step(params, state)
    assert loss(params) < 0.5 * first


@every_optimizer
def test_without_a_gradient_weights_shrink_by_rate_times_decay_and_the_rest_stays(cfg):
    cfg = cfg.model_copy(update={"weight_decay": 0.3})
    params = normal(0)
    after, _ = run(cfg, params, [jax.tree.map(jnp.zeros_like, params)])
    for name, p in params.items():
        rate, decay = 0.01, 0.3 if name in DECAYED else 0.0
        if isinstance(cfg, Muon) and name not in HIDDEN:
            rate, decay = 0.02, cfg.adam.weight_decay if name in DECAYED else 0.0
        np.testing.assert_allclose(after[name], p * (1 - rate * decay), rtol=1e-6, err_msg=name)


@every_optimizer
def test_a_stack_of_layers_is_updated_as_each_layer_alone(cfg):
    axes = {name: ax for name, ax in AXES.items() if ax[0] == "layers"}

    def of_layer(tree, layer):
        return {n: x[layer] for n, x in tree.items()}

    def unequal(tree, ratio):  # layers of very different sizes: a mean over the stack would show
        return {n: jnp.stack([ratio**layer * x[layer] for layer in range(3)]) for n, x in tree.items()}

    params, gradients = unequal(normal(0, axes), 10), [unequal(normal(s, axes), 7) for s in range(1, 4)]
    together, _ = run(cfg, params, gradients, axes)
    alone_axes = {n: ax[1:] for n, ax in axes.items()}
    for layer in range(3):
        alone, _ = run(cfg, of_layer(params, layer), [of_layer(g, layer) for g in gradients], alone_axes)
        for name, p in of_layer(together, layer).items():
            np.testing.assert_allclose(p, alone[name], rtol=2e-5, atol=2e-5, err_msg=f"{name} of layer {layer}")


@every_optimizer
@pytest.mark.parametrize("of", ["gradients", "weights"])
def test_state_is_float32_for_bfloat16(cfg, of):
    params, grads = normal(0), normal(1)
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    params, grads = (params, half(grads)) if of == "gradients" else (half(params), grads)
    tx = build(cfg, constant(cfg), AXES)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, grads, state, params)
    for tree in (state, after):
        assert {x.dtype for x in jax.tree.leaves(tree)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert {u.dtype for u in updates.values()} == {jnp.dtype("float32")}


@every_optimizer
def test_the_structure_of_the_state_does_not_change(cfg):
    params = normal(0)
    tx = build(cfg, constant(cfg), AXES)
    before = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(tx.update, params, before, params)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(before)] == [(x.shape, x.dtype) for x in jax.tree.leaves(after)]


@every_optimizer
def test_the_axes_of_every_state_leaf_have_its_sizes(cfg):
    params = normal(0)
    state = jax.eval_shape(build(cfg, constant(cfg), AXES).init, params)
    seen = 0

    def check(leaf, axes):
        nonlocal seen
        assert len(axes) == len(leaf.shape)
        if any(axes):
            assert leaf.shape == tuple(SIZES[a] for a in axes)
            seen += 1
        else:
            assert leaf.size <= 3  # counters and Newton-Schulz coefficients

    jax.tree.map(check, state, state_axes(state, params, AXES))
    copies = {"adamw": 2, "lion": 1, "sgd": 1, "muon": 1, "adafactor": 1}[cfg.kind]
    assert seen >= copies * len(AXES) or cfg == SGD(learning_rate=0.01, momentum=0.0)


@every_optimizer
def test_the_state_is_born_in_its_shards_and_updates_as_on_one_device(cfg):
    mesh = make_mesh(Mesh(fsdp=2, tensor=2), jax.devices()[:4])
    place = lambda axes: NamedSharding(mesh, P(*FSDP.mesh_axes(axes)))
    params, grads = normal(0), normal(1)
    tx = build(cfg, constant(cfg), AXES)
    shapes = jax.eval_shape(tx.init, params)
    where = jax.tree.map(lambda _, axes: place(axes), shapes, state_axes(shapes, params, AXES))
    sharded = {n: jax.device_put(p, place(AXES[n])) for n, p in params.items()}
    state = jax.jit(tx.init, out_shardings=where)(sharded)
    for leaf in jax.tree.leaves(state):
        if leaf.ndim >= 2 and leaf.size >= 48:
            assert leaf.addressable_shards[0].data.size <= leaf.size // 2
    updates, after = jax.jit(tx.update, out_shardings=(None, where))(grads, state, sharded)
    expected, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    for name in params:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, state)


@every_optimizer
def test_the_rate_follows_the_schedule_by_updates_made(cfg):
    params = normal(0)
    zero = jax.tree.map(jnp.zeros_like, params)
    cfg = cfg.model_copy(update={"weight_decay": 0.5})
    tx = build(cfg, lambda k: cfg.learning_rate * (k + 1), AXES)
    update = jax.jit(tx.update)
    state = jax.jit(tx.init)(params)
    for step in range(3):
        updates, state = update(zero, state, params)
        np.testing.assert_allclose(updates[W], -0.01 * (step + 1) * 0.5 * params[W], rtol=1e-6)


# --- oracles -------------------------------------------------------------------------------------------------------


def numpy_run(cfg, rule):
    """Five updates are those of `rule(name, p, g, step, memory) -> p`, in float64 numpy."""
    axes = {name: AXES[name] for name in (W, B)}
    params, gradients = normal(0, axes), [normal(s, axes) for s in range(1, 6)]
    after, _ = run(cfg, params, gradients, axes)
    for name in axes:
        p, memory = np.float64(params[name]), {}
        for step, grads in enumerate(gradients, start=1):
            p = rule(name, p, np.float64(grads[name]), step, memory)
        np.testing.assert_allclose(after[name], p, rtol=1e-4, atol=1e-5, err_msg=name)


def test_adamw_is_its_paper():
    def rule(name, p, g, step, memory):
        m = memory["m"] = 0.8 * memory.get("m", 0) + 0.2 * g
        v = memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * g**2
        move = m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-3)
        return p - 0.05 * (move + (0.2 * p if name == W else 0))

    numpy_run(AdamW(learning_rate=0.05, b1=0.8, b2=0.95, epsilon=1e-3, weight_decay=0.2), rule)


def test_lion_is_its_paper():
    def rule(name, p, g, step, memory):
        m = memory.get("m", np.zeros_like(g))
        memory["m"] = 0.99 * m + 0.01 * g
        return p - 0.05 * (np.sign(0.9 * m + 0.1 * g) + (0.2 * p if name == W else 0))

    numpy_run(Lion(learning_rate=0.05, weight_decay=0.2), rule)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_its_definition(nesterov):
    def rule(name, p, g, step, memory):
        m = memory["m"] = 0.9 * memory.get("m", 0) + g
        return p - 0.05 * ((g + 0.9 * m if nesterov else m) + (0.2 * p if name == W else 0))

    numpy_run(SGD(learning_rate=0.05, nesterov=nesterov, weight_decay=0.2), rule)


@pytest.mark.parametrize("min_dim", [4, 1000], ids=["factored", "unfactored"])
@pytest.mark.parametrize("scale", [False, True], ids=["absolute", "relative"])
def test_adafactor_is_its_paper(min_dim, scale):
    def rule(name, p, g, step, memory):
        beta = 1 - step**-0.8
        if name == W and min_dim == 4:
            r = memory["r"] = beta * memory.get("r", 0) + (1 - beta) * (g**2).sum(1)
            c = memory["c"] = beta * memory.get("c", 0) + (1 - beta) * (g**2).sum(0)
            v = np.outer(r, c) / r.sum()
        else:
            v = memory["v"] = beta * memory.get("v", 0) + (1 - beta) * g**2
        u = g / np.sqrt(v)
        u /= max(1, np.sqrt((u**2).mean()) / 0.7)
        size = max(1e-3, np.sqrt((p**2).mean())) if scale else 1
        return p - 0.05 * (u * size + (0.2 * p if name == W else 0))

    cfg = Adafactor(learning_rate=0.05, min_dim=min_dim, clipping=0.7, scale_by_parameter=scale, weight_decay=0.2)
    numpy_run(cfg, rule)


def test_adafactor_of_a_plain_matrix_is_that_of_optax():
    axes = {W: AXES[W]}
    params, gradients = normal(0, axes), [normal(s, axes) for s in range(1, 6)]
    ours, _ = run(Adafactor(learning_rate=0.05, min_dim=4), params, gradients, axes)
    tx = optax.adafactor(0.05, min_dim_size_to_factor=4, multiply_by_parameter_scale=False)
    state = tx.init(params)
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(ours[W], params[W], rtol=1e-5, atol=1e-6)


def test_adafactor_keeps_rows_plus_columns_for_a_projection_of_all_heads():
    name = "blocks.0.attention.w_q"  # 3 layers of 8 x (4 x 2)
    few = "blocks.0.attention.w_k"  # 3 layers of 8 x (2 x 2)
    axes = {name: AXES[name], few: MORE_AXES[few]}
    state, _ = build(Adafactor(learning_rate=0.1, min_dim=8), lambda k: 0.1, axes).init(normal(0, axes))
    assert (state.row[name].shape, state.column[name].shape) == ((3, 8), (3, 4, 2))
    assert (state.row.keys(), state.full.keys()) == ({name}, {few})


@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_muon_moves_hidden_matrices_along_the_orthogonal_factor_of_their_gradient(name):
    """First step: momentum is the gradient. Singular vectors are the SVD's; singular values that are more than 5 % of
    the norm become 0.65..1.25 (where Jordan's coefficients take them), times 0.2 sqrt(max(rows, columns))."""
    axes, grads = {name: AXES[name]}, {name: normal(1)[name]}
    after, _ = run(Muon(learning_rate=1.0, weight_decay=0.0), {name: jnp.zeros_like(grads[name])}, [grads], axes)

    stack, rows = {"w_q": (3, 8), "w_o": (3, 4 * 2), "w_down": (1, 20)}[name.split(".")[-1]]
    for g, u in zip(np.reshape(grads[name], (stack, rows, -1)), np.reshape(after[name], (stack, rows, -1))):
        left, sizes, right = np.linalg.svd(g, full_matrices=False)
        turned = left.T @ -u @ right.T / (0.2 * np.sqrt(max(g.shape)))
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=2e-3)
        large = np.diag(turned)[sizes > 0.05 * np.linalg.norm(sizes)]
        assert len(large) > len(sizes) / 2
        assert ((large > 0.65) & (large < 1.25)).all()


def test_an_update_of_muon_has_the_root_mean_square_that_the_paper_wants():
    """Liu et al. 2025, section 2.2: 0.2 sqrt(max) gives a full-rank update the RMS of AdamW's, about 0.2."""
    axes = {"w": ("embed", "mlp")}
    grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)}
    cfg = Muon(learning_rate=1.0, weight_decay=0.0)
    tx = build(cfg, constant(cfg), axes)
    update = tx.update(grads, tx.init(grads), grads)[0]["w"]
    assert 0.15 < jnp.sqrt(jnp.mean(update**2)) < 0.25


def test_muon_updates_the_rest_as_adamw_with_its_own_rate():
    cfg = Muon(learning_rate=0.5, adam=AdamW(learning_rate=0.02, weight_decay=0.3))
    gradients = [normal(s) for s in range(1, 4)]
    muon, _ = run(cfg, normal(0), gradients)
    adam, _ = run(cfg.adam, normal(0), gradients)
    for name in AXES.keys() - HIDDEN:
        np.testing.assert_allclose(muon[name], adam[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_rows_that_never_had_a_gradient_stay_finite_under_adafactor():
    axes = {"embedding": AXES["embedding"]}
    params, grads = normal(0, axes), normal(1, axes)
    sparse = {"embedding": grads["embedding"].at[3:].set(0)}
    after, _ = run(Adafactor(learning_rate=0.01, min_dim=4), params, [sparse, sparse, grads], axes)
    assert all(jnp.isfinite(p).all() for p in after.values())
    first, _ = run(Adafactor(learning_rate=0.01, min_dim=4), params, [sparse], axes)
    np.testing.assert_array_equal(first["embedding"][3:], params["embedding"][3:])

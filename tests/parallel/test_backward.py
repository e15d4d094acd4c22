import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.parallel.backward import Pullback, is_product

POLICIES = jax.checkpoint_policies
REMAT = {
    "none": lambda f: f,
    "full": jax.checkpoint,
    "dots": functools.partial(jax.checkpoint, policy=POLICIES.dots_saveable),
}


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: (dy @ kept[1].T, kept[0].T @ dy))


def layer(w, x_and_past, context, number):
    """All that a layer of a model may hold: norms, custom gradients, masks, random draws, a second way in and out."""
    x, past = x_and_past
    mask, key = context["mask"] & (jnp.arange(6) < 5), jax.random.fold_in(context["key"], number)
    h = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * w["scale"]
    h = jax.nn.silu(product(h, w["in"])) + w["bias"]
    h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h, 0) * mask[:, None]
    new = jnp.tanh(h @ w["out"]) + past
    return x + new * number, (new, past)


def arguments():
    r = jax.random.split(jax.random.key(0), 8)
    w = {
        "scale": jnp.ones(4),
        "in": jax.random.normal(r[0], (4, 8)),
        "bias": jnp.ones(8),
        "out": jax.random.normal(r[1], (8, 4)),
    }
    x = jax.random.normal(r[2], (6, 4)), jax.random.normal(r[3], (6, 4))
    context = {"mask": jnp.arange(6) > 0, "key": r[4]}
    return w, x, context, jnp.float32(3)


@pytest.mark.parametrize("policy", REMAT)
def test_the_pieces_make_the_gradient(policy):
    fn, (w, x, context, number) = REMAT[policy](layer), arguments()
    y, pull = jax.vjp(lambda w, x: fn(w, x, context, number), w, x)
    dy = jax.tree.map(jnp.cos, y)
    dw, dx = pull(dy)

    pieces = Pullback(fn, w, x, context, number)
    same = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6))
    y_again, kept = pieces.forward(w, x, context, number)
    same(y_again, y)
    assert [(k.shape, k.dtype) for k in kept] == [(k.shape, k.dtype) for k in pieces.kept]
    whole, dx_again = pieces.backward(w, context, number, kept, dy)
    same(dx_again, dx)
    same(whole, jax.tree.leaves(dw))

    soon, dx_again, waiting = pieces.early(w, context, number, kept, dy)
    assert [(k.shape, k.dtype) for k in waiting] == [(k.shape, k.dtype) for k in pieces.waiting]
    late = pieces.late(w, context, number, waiting)
    same(dx_again, dx)
    names = list(w)
    assert [n for n, g in zip(sorted(names), late) if g is not None] == [
        "in",
        "out",
    ]  # matrices; in the order of leaves
    same([a if b is None else b for a, b in zip(soon, late)], jax.tree.leaves(dw))


def test_neither_weights_nor_masks_nor_keys_are_kept():
    w, x, context, number = arguments()
    for policy, remat in REMAT.items():
        kept = Pullback(remat(layer), w, x, context, number).kept
        assert not {k.shape for k in kept} & {(4, 8), (8, 4), (4,)}, policy
        assert not {k.shape for k in kept if k.dtype == bool} & {(6,), (6, 1)}, policy
        assert all(not jax.dtypes.issubdtype(k.dtype, jax.dtypes.prng_key) for k in kept)
    assert len(Pullback(jax.checkpoint(layer), w, x, context, number).kept) <= 2  # x and past


def test_no_product_is_made_twice_or_early():
    w, x, context, number = arguments()
    pieces = Pullback(layer, w, x, context, number)
    kept, dy = pieces.kept, jax.eval_shape(layer, w, x, context, number)

    def products(fn, *arguments) -> int:
        return sum(is_product(e) for e in jax.make_jaxpr(fn)(*arguments).jaxpr.eqns)

    assert products(pieces.forward, w, x, context, number) == 2
    assert products(pieces.backward, w, context, number, kept, dy) == 4
    assert products(pieces.early, w, context, number, kept, dy) == 2
    assert products(pieces.late, w, context, number, pieces.waiting) == 2


def test_pieces_may_run_in_loops_of_one_program():
    w, x, context, number = arguments()
    steps = 3
    many = jax.tree.map(lambda a: jnp.stack([a * (1 + i) for i in range(steps)]), w)

    def stack(many, x):
        for i in range(steps):
            x, _ = layer(jax.tree.map(lambda a, i=i: a[i], many), (x, x), context, jnp.float32(i))
        return x

    @jax.jit
    def by_pieces(many, x):
        def fn(w, x, context, number):
            return layer(w, (x, x), context, number)[0]

        pieces = Pullback(fn, w, x, context, number)
        numbers = jnp.arange(steps, dtype=jnp.float32)
        _, kept = jax.lax.scan(lambda x, wn: pieces.forward(wn[0], x, context, wn[1]), x, (many, numbers))

        def back(dx, wnk):
            dw, dx = pieces.backward(wnk[0], context, wnk[1], wnk[2], dx)
            return dx, dw

        return jax.lax.scan(back, jnp.ones_like(x), (many, numbers, kept), reverse=True)

    expected_w, expected_x = jax.grad(lambda many, x: stack(many, x).sum(), argnums=(0, 1))(many, x[0])
    dx, dw = by_pieces(many, x[0])
    np.testing.assert_allclose(dx, expected_x, rtol=2e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4), dw, jax.tree.leaves(expected_w))

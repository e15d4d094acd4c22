import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.parallel.collectives import by_device, exchange
from jaxllm.parallel.config import Mesh
from jaxllm.parallel.sharding import make_mesh

N = 4


@functools.cache
def experts() -> jax.sharding.Mesh:
    return make_mesh(Mesh(fsdp=1, expert=N))


def shares(x: jax.Array) -> list[np.ndarray]:
    """What each device has, in the order of the mesh."""
    return [np.asarray(s.data) for s in sorted(x.addressable_shards, key=lambda s: s.device.id)]


def is_root(axis: str):
    return lax.axis_index(axis) == 0


# What every device computes from its own x; what device i has then, in numpy, of all of theirs (x: [devices, ...]).
COLLECTIVES = {
    "broadcast": (lambda x: lax.psum(jnp.where(is_root("expert"), x, 0), "expert"), lambda x, i: x[0]),
    "reduce": (lambda x: jnp.where(is_root("expert"), lax.psum(x, "expert"), x), lambda x, i: x[i] if i else x.sum(0)),
    "all-reduce": (lambda x: lax.psum(x, "expert"), lambda x, i: x.sum(0)),
    "reduce-scatter": (
        lambda x: lax.psum_scatter(x, "expert", scatter_dimension=0, tiled=True),
        lambda x, i: np.split(x.sum(0), N)[i],
    ),
    "all-gather": (lambda x: lax.all_gather(x, "expert", tiled=True), lambda x, i: np.concatenate(x)),
    "reduce-scatter then all-gather": (
        lambda x: lax.all_gather(lax.psum_scatter(x, "expert", tiled=True), "expert", tiled=True),
        lambda x, i: x.sum(0),
    ),
    "all-to-all": (
        lambda x: lax.all_to_all(x, "expert", 0, 0, tiled=True),
        lambda x, i: np.concatenate([np.split(y, N)[i] for y in x]),
    ),
    "permute": (lambda x: lax.ppermute(x, "expert", [(i, (i + 1) % N) for i in range(N)]), lambda x, i: x[i - 1]),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_by_device_runs_collectives_over_a_mesh_axis(name):
    collective, expected = COLLECTIVES[name]
    x = np.random.default_rng(0).integers(0, 100, (N, 8, 3)).astype(np.float32)
    run = jax.jit(by_device(lambda x: collective(x[0])[None], experts(), (P("expert"),), P("expert")))
    for i, mine in enumerate(shares(run(x))):
        np.testing.assert_array_equal(mine[0], expected(x, i))


def test_exchange_takes_tokens_to_the_devices_of_their_experts_and_back():
    x_GECD = np.random.default_rng(0).normal(size=(N, 2 * N, 3, 5)).astype(np.float32)  # 4 groups, 8 experts
    by_group, by_expert = P("expert"), P(None, "expert")

    @jax.jit
    def there_and_back(x):
        there, layout = exchange(x, experts(), by_group, "expert", source=0, target=1)
        assert NamedSharding(experts(), layout).is_equivalent_to(NamedSharding(experts(), by_expert), x.ndim)
        return there, exchange(there, experts(), layout, "expert", source=1, target=0)[0]

    placed = jax.device_put(x_GECD, NamedSharding(experts(), by_group))
    there, back = there_and_back(placed)
    for i, mine in enumerate(shares(there)):  # device i: its two experts' slots, of all groups
        np.testing.assert_array_equal(mine, x_GECD[:, 2 * i : 2 * i + 2])
    for i, mine in enumerate(shares(back)):
        np.testing.assert_array_equal(mine, x_GECD[i : i + 1])
    text = there_and_back.lower(placed).compile().as_text()
    assert text.count(" all-to-all(") == 2 and " all-gather(" not in text


def test_exchange_keeps_what_other_mesh_axes_share_out():
    mesh = make_mesh(Mesh(fsdp=1, context=2, tensor=2))
    x_TN = np.arange(32.0).reshape(4, 8)
    y = jax.jit(lambda x: exchange(x, mesh, P("context", "tensor"), "context", source=0, target=1)[0])(x_TN)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(None, ("tensor", "context"))), 2)
    np.testing.assert_array_equal(y, x_TN)


def test_gradients_come_back_by_the_exchange():
    x, y = (jnp.asarray(np.random.default_rng(i).normal(size=(N, N, 2)), jnp.float32) for i in range(2))

    def total(x):
        return jnp.sum(y * jnp.square(exchange(x, experts(), P("expert"), "expert", source=0, target=1)[0]))

    grad = jax.jit(jax.grad(total))
    np.testing.assert_allclose(grad(x), 2 * x * y, rtol=1e-6)
    assert " all-reduce(" not in grad.lower(x).compile().as_text()


def test_by_device_takes_the_mesh_axes_that_are_left():
    """Inside a function that each stage of a pipeline runs on its own, too."""
    mesh = make_mesh(Mesh(fsdp=1, pipe=2, context=2))
    x = np.arange(8.0).reshape(2, 4)

    def stage(x):  # the share of one stage; its second dimension is still whole
        return by_device(lambda x: lax.psum(x, "context"), mesh, (P(None, "context"),), P())(x)

    outer = jax.shard_map(
        stage, mesh=mesh, in_specs=P("pipe"), out_specs=P("pipe"), axis_names={"pipe"}, check_vma=False
    )
    np.testing.assert_array_equal(jax.jit(outer)(x), x[:, :2] + x[:, 2:])

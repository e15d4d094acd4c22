"""Products and lookups whose gradients are reduced by hand, beside what the partitioner makes of plain ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.axes import placed_by
from jaxllm.models.layers.linear import linear, lookup
from jaxllm.parallel.config import Mesh, Sharding
from jaxllm.parallel.sharding import make_mesh, placement, ring_groups, rings, sharding

B, T, D, F, V = 8, 8, 16, 24, 32
MESHES = [
    {"fsdp": 4}, {"data": 2, "fsdp": 2}, {"data": 4, "fsdp": 1}, {"fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2},
]  # fmt: skip
NAMES = ["-".join(f"{a}{n}" for a, n in mesh.items()) for mesh in MESHES]


def run(cfg: dict | None, rules: str | dict = "zero3"):
    """Gradients of a lookup and two products on a mesh (None: one device), and the compiled program."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "table": jax.random.normal(keys[0], (V, D)), "up": jax.random.normal(keys[1], (D, F)) / 4,
        "down": jax.random.normal(keys[2], (F, D)) / 5,
    }  # fmt: skip
    axes = {"table": ("vocab", "embed"), "up": ("embed", "mlp"), "down": ("mlp", "embed")}
    ids = np.random.default_rng(0).integers(0, V + 3, (B, T), dtype=np.int32)  # some beyond the table
    place = gradients = None
    if cfg is not None:
        mesh, rules = make_mesh(Mesh(**cfg)), Sharding.model_validate(rules)
        place = placement(mesh, rules.activations, rules.gradients)
        gradients = {k: sharding(mesh, rules.gradients, a) for k, a in axes.items()}
        params = {k: jax.device_put(x, sharding(mesh, rules.parameters, axes[k])) for k, x in params.items()}
        ids = jax.device_put(ids, sharding(mesh, rules.activations, ("batch", "seq")))

    def loss(params, ids):
        with placed_by(place):
            narrow, wide = ("batch", "seq", "embed"), ("batch", "seq", "mlp")
            x = lookup(params["table"], ids)
            h = jnp.tanh(linear("BTD,DF->BTF", x, params["up"], narrow, ("embed", "mlp"), wide))
            y = linear("BTF,FD->BTD", h, params["down"], wide, ("mlp", "embed"), narrow)
            return jnp.sum(jnp.square(y))

    step = jax.jit(jax.grad(loss), out_shardings=gradients).lower(params, ids).compile()
    return step(params, ids), step.as_text()


def assert_gradients_of_one_device(*args) -> None:
    expected, _ = run(None)
    got, _ = run(*args)
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES, ids=NAMES)
def test_gradients_on_a_mesh_are_those_of_one_device(mesh):
    assert_gradients_of_one_device(mesh)


def everywhere(**axes) -> dict:
    return dict.fromkeys(("parameters", "gradients", "optimizer"), axes)


LAYOUTS = {
    "mlp over fsdp, then tensor": ({"fsdp": 2, "tensor": 2}, everywhere(embed=None, mlp=("fsdp", "tensor"))),
    "mlp over tensor, then fsdp": ({"fsdp": 2, "tensor": 2}, everywhere(embed=None, mlp=("tensor", "fsdp"))),
    "embed over tensor": ({"fsdp": 2, "tensor": 2}, everywhere(embed="tensor", vocab="fsdp", mlp="fsdp")),
    "vocab over fsdp": ({"fsdp": 4}, everywhere(embed=None, vocab="fsdp")),
    "gradients whole": ({"fsdp": 2, "tensor": 2}, {"gradients": {"mlp": None}}),
    "activations whole": ({"fsdp": 2, "tensor": 2}, {"activations": {"mlp": None}}),
    "activations over one axis twice": ({"fsdp": 2, "tensor": 2}, {"activations": {"embed": "tensor"}}),
    "rows whole over context": ({"fsdp": 2, "context": 2}, {"activations": {"seq": None, "norm_seq": None}}),
    "rows whole over fsdp": ({"data": 2, "fsdp": 2}, {"activations": {"batch": "data"}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_may_lie_otherwise_than_what_they_are_computed_from(layout):
    assert_gradients_of_one_device(*LAYOUTS[layout])


def test_gradients_that_are_shared_out_leave_by_reduce_scatter():
    _, text = run({"fsdp": 4})
    assert len(re.findall(r" reduce-scatter\(", text)) == 2  # up, down; the table's rows are exchanged
    assert re.search(r" all-to-all\(", text)
    assert not re.search(r"all-reduce\(", text)


def test_replicas_sum_what_is_left_of_a_gradient_after_it_was_shared_out():
    _, text = run({"data": 2, "fsdp": 2})
    results = re.findall(r"= (\S.*) all-reduce\(", text)  # one array, or a tuple of those that were combined
    summed = [shape for result in results for shape in re.findall(r"f32\[([\d,]+)\]", result)]
    assert sorted(summed) == sorted([f"{V},{D // 2}", f"{D // 2},{F}", f"{F},{D // 2}"])


def test_gradients_that_every_replica_holds_are_all_reduced():
    _, text = run({"data": 4, "fsdp": 1}, "ddp")
    assert not re.search(r" reduce-scatter\(", text)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((16, 16), (16, 16)), ((4, 4), (16,)), ((4, 4, 4), (16, 4)), ((4, 4, 8), (16, 8)), ((8, 8, 8), (8, 8, 8))],
)
def test_a_torus_is_reduced_ring_after_ring_of_at_most_sixteen(shape, expected):
    assert rings(list(np.ndindex(*shape))) == expected


@pytest.mark.parametrize(("shape", "expected"), [((4, 4), (4, 4)), ((2, 2, 2), (4, 2)), ((2, 4), (2, 4)), ((8,), (8,))])
def test_a_small_torus_is_reduced_by_fours(shape, expected):
    assert rings(list(np.ndindex(*shape)), 4) == expected


def test_what_is_reduced_ring_after_ring_is_the_sum_of_all(monkeypatch):
    monkeypatch.setattr("jaxllm.parallel.sharding.RING", 2)
    monkeypatch.setattr("jaxllm.parallel.sharding.rings", lambda coords, most: (2, 2))  # as if the four were a square
    assert ring_groups(make_mesh(Mesh(fsdp=4)), "fsdp") == [[[0, 2], [1, 3]], [[0, 1], [2, 3]]]
    assert_gradients_of_one_device({"fsdp": 4})
    assert len(re.findall(r" reduce-scatter\(", run({"fsdp": 4})[1])) == 4


def test_devices_in_a_line_are_reduced_at_once():
    assert ring_groups(make_mesh(Mesh(fsdp=4)), "fsdp") == [None]
    assert rings([(i,) for i in range(64)]) == (64,)

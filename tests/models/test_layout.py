import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core.errors import CheckpointError
from jaxllm.models.config import DecoderConfig
from jaxllm.models.layout import logical_names, stack, stacked_name, unstack
from jaxllm.models.module import abstract, merge

BLOCK = {"attention": {"num_heads": 2}, "ffn": {"mlp": 24}}


def config(num_layers: int, period: int) -> DecoderConfig:
    return DecoderConfig(vocab=32, context=16, embed=16, num_layers=num_layers, block=BLOCK, pattern=[{}] * period)


def filled(shapes: dict, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=x.shape).astype(x.dtype) for name, x in shapes.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


CASES = st.tuples(st.integers(3, 8), st.integers(1, 3), st.lists(st.integers(1, 3), max_size=2), st.integers(0, 9))


def grouped(num_layers: int, period: int, dims: list[int], seed: int) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
    """A config and weights as its run holds them, of any shapes, some of one layer only."""
    cfg = config(num_layers, period)
    shapes = {"embedding": (5, 2), "final_norm.scale": (2,)}
    shapes |= {f"blocks.{s}.part.w": (cfg.num_groups, *dims) for s in range(period)}
    shapes |= {f"tail.{t}.part.w": tuple(dims) for t in range(num_layers % period)}
    return cfg, filled({n: jax.ShapeDtypeStruct(shape, np.float32) for n, shape in shapes.items()}, seed)


@given(CASES)
def test_stack_undoes_unstack(case):
    cfg, params = grouped(*case)
    assert same(stack(unstack(params, cfg), cfg), params)


@given(CASES)
def test_layer_i_is_group_i_over_p_of_slot_i_mod_p(case):
    cfg, params = grouped(*case)
    logical, period = unstack(params, cfg), len(cfg.blocks)
    assert {n for n in logical if "part" in n} == {f"layers.{i}.part.w" for i in range(cfg.num_layers)}
    for i in range(cfg.num_layers):
        group, slot = divmod(i, period)
        wanted = params[f"blocks.{slot}.part.w"][group] if group < cfg.num_groups else params[f"tail.{slot}.part.w"]
        assert np.array_equal(logical[f"layers.{i}.part.w"], wanted)
    assert logical["embedding"] is params["embedding"]


@given(CASES, st.sampled_from(["", "opt/0/mu/", "opt/inner/matrix/nu/"]))
def test_names_are_translated_both_ways_below_any_path(case, path):
    cfg, params = grouped(*case)
    for name in params:
        for logical in logical_names(path + name, cfg):
            assert logical.startswith(path)
            assert stacked_name(logical, cfg) == path + name


@given(CASES)
def test_shapes_and_jax_arrays_are_laid_out_like_numpy_arrays(case):
    cfg, params = grouped(*case)
    logical = unstack(params, cfg)
    on_device = unstack({n: jnp.asarray(x) for n, x in params.items()}, cfg)
    shapes = unstack({n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in params.items()}, cfg)
    assert same(on_device, logical)
    assert {n: x.shape for n, x in shapes.items()} == {n: x.shape for n, x in logical.items()}
    assert {n: x.shape for n, x in stack(shapes, cfg).items()} == {n: x.shape for n, x in params.items()}


def test_a_model_computes_the_same_in_every_grouping():
    num_layers = 5  # 5 groups of 1; 2 of 2 and a tail of 1; 1 of 3 and a tail of 2
    logical = unstack(filled(abstract(config(num_layers, 1))[1]), config(num_layers, 1))
    tokens_BT = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    positions_BT = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6))
    logits = []
    for period in (1, 2, 3):
        cfg = config(num_layers, period)
        graphdef, shapes, _ = abstract(cfg)
        params = {n: jnp.asarray(x) for n, x in stack(logical, cfg).items()}
        assert {n: x.shape for n, x in params.items()} == {n: x.shape for n, x in shapes.items()}
        logits.append(merge(graphdef, params)(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits[2], logits[0], rtol=1e-4, atol=1e-4)


def test_a_layer_keeps_the_sharding_of_its_stack():
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    one = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    x = jax.device_put(jnp.arange(3 * 4 * 8.0).reshape(3, 4, 8), where)
    logical = unstack({"blocks.0.w": x}, config(3, 1))
    shapes = unstack({"blocks.0.w": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)}, config(3, 1))
    for i in range(3):
        assert logical[f"layers.{i}.w"].sharding == shapes[f"layers.{i}.w"].sharding == one
        assert np.array_equal(logical[f"layers.{i}.w"], x[i])


def test_weights_that_do_not_make_the_layers_are_named():
    cfg = config(4, 1)
    logical = unstack(filled(abstract(cfg)[1]), cfg)
    with pytest.raises(CheckpointError, match=r"'layers\.2\.ffn\.w_up' is missing"):
        stack({n: x for n, x in logical.items() if n != "layers.2.ffn.w_up"}, cfg)
    with pytest.raises(CheckpointError, match=r"layers\.4\..*num_layers=4"):
        stack(unstack(filled(abstract(config(5, 1))[1]), config(5, 1)), cfg)
    with pytest.raises(CheckpointError, match=r"must be alike.*layers\.3\.ffn\.w_up is \(2, 2\)"):
        stack(logical | {"layers.3.ffn.w_up": np.zeros((2, 2), np.float32)}, cfg)

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm.core.axes import constrain, placed_by
from jaxllm.core.config import dump, merge, parse
from jaxllm.core.errors import ConfigError
from jaxllm.parallel.config import ACTIVATIONS, FSDP, MESH_AXES, TENSOR, Mesh, Rules, Sharding
from jaxllm.parallel.sharding import fitting, make_mesh, placement, sharding

ROOT = Path(__file__).parents[2]


def test_an_axis_no_rule_knows_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"unknown logical axis 'mlpp' in \('embed', 'mlpp'\); known: batch, seq, norm_seq, embed"
    ):
        Rules().mesh_axes(("embed", "mlpp"))


def test_two_dimensions_on_one_mesh_axis_are_refused():
    with pytest.raises(ConfigError, match="would shard two dimensions over mesh axis 'fsdp'"):
        FSDP.model_copy(update={"mlp": "fsdp"}).mesh_axes(("embed", "mlp"))
    with pytest.raises(ConfigError, match="mesh axis 'fsdp'"):
        FSDP.model_copy(update={"mlp": ("tensor", "fsdp")}).mesh_axes(("embed", "mlp"))


def test_a_mesh_axis_that_does_not_exist_is_refused_when_the_config_is_read():
    with pytest.raises(
        ConfigError, match="activations.seq: no mesh axis 'tensr'; known: data, pipe, fsdp, expert, context, tensor"
    ):
        parse(Sharding, {"activations": {"seq": "tensr"}})


def test_positions_lie_on_mesh_axes_in_their_order():
    assert Rules(seq=("fsdp", "context")).mesh_axes(("seq",)) == (("fsdp", "context"),)
    with pytest.raises(ConfigError, match=r"seq: .* in their order: \['fsdp', 'context'\], got \['context', 'fsdp'\]"):
        parse(Sharding, {"activations": {"seq": ["context", "fsdp"]}})


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("ddp", (TENSOR, TENSOR, TENSOR)),
        ("zero1", (TENSOR, TENSOR, FSDP)),
        ("zero2", (TENSOR, FSDP, FSDP)),
        ("zero3", (FSDP,) * 3),
    ],
)
def test_zero_stages_are_values(preset, expected):
    value = Sharding.model_validate(preset)
    assert (value.parameters, value.gradients, value.optimizer) == expected
    assert value.activations == ACTIVATIONS
    assert Sharding.model_validate(value.model_dump()) == value


def test_a_preset_can_be_changed_in_one_place():
    value = parse(Sharding, {"preset": "zero1", "parameters": {"kv_heads": None}})
    assert value.parameters == TENSOR.model_copy(update={"kv_heads": None})
    assert value.optimizer == FSDP
    assert "preset" not in dump(value)


def test_the_default_is_zero3():
    assert Sharding() == Sharding.model_validate("zero3")


def test_the_free_mesh_axis_takes_what_is_left():
    assert Mesh(data=2, fsdp=-1, tensor=2).resolve(16) == Mesh(data=2, fsdp=4, tensor=2)
    assert Mesh().resolve(1).sizes == (1,) * 6


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        ({"data": 3, "fsdp": 1}, 4, "needs 3 devices, there are 4"),
        ({"data": 3, "fsdp": -1}, 4, "4 devices do not divide by 3"),
        ({"data": 8, "fsdp": 1}, 4, "needs 8 devices, there are 4"),
    ],
)
def test_a_mesh_that_does_not_fit_says_so_in_numbers(mesh, devices, message):
    with pytest.raises(ConfigError, match=message):
        Mesh(**mesh).resolve(devices)


def test_at_most_one_mesh_axis_is_free():
    with pytest.raises(ConfigError, match="at most one is -1"):
        parse(Mesh, {"data": -1, "fsdp": -1})


def test_a_dimension_that_does_not_divide_is_named():
    mesh = make_mesh(Mesh(fsdp=4))
    with pytest.raises(ConfigError, match=r"w: embed=6 does not divide over mesh axis fsdp of 4 devices"):
        fitting(mesh, FSDP, ("embed", "mlp"), (6, 8), "w")


def test_activations_are_placed_only_inside_a_run():
    mesh = make_mesh(Mesh(data=2, fsdp=1, tensor=2))
    x = jnp.ones((4, 2, 8))
    assert constrain(x, "batch", "seq", "mlp") is x

    def inside(x):
        with placed_by(placement(mesh, ACTIVATIONS)):
            return constrain(x, "batch", "seq", "mlp")

    placed = jax.jit(inside)(x)
    assert placed.sharding.is_equivalent_to(sharding(mesh, ACTIVATIONS, ("batch", "seq", "mlp")), 3)
    assert placed.addressable_shards[0].data.shape == (2, 2, 4)


def test_models_name_no_mesh_axis():
    axes = [axis for axis in MESH_AXES if axis != "context"]  # also the model's longest row
    named = re.compile(rf"""["']({"|".join(axes)})["']""")
    for file in (ROOT / "jaxllm" / "models").rglob("*.py"):
        assert not named.search(file.read_text()), file


def test_partial_rules_are_laid_over_the_default_preset():
    value = parse(Sharding, {"parameters": {"kv_heads": None}, "activations": {"kv_heads": None}})
    assert value.parameters == FSDP.model_copy(update={"kv_heads": None})
    assert value.activations == ACTIVATIONS.model_copy(update={"kv_heads": None})
    assert value.optimizer == FSDP


def test_rules_are_laid_over_a_preset_that_a_base_names_alone():
    base = {"sharding": "ddp"}
    merged = merge(base, {"sharding": {"activations": {"norm_seq": ["context", "tensor"]}}})
    mine = Sharding.model_validate(merged["sharding"])
    assert mine.activations.norm_seq == ("context", "tensor") and mine.parameters == TENSOR

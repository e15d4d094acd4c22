"""Mixtures in training: what their routers add to the loss, and meshes that share out experts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import ROWS, assert_same_run, random_batch, run_config

from jaxllm.core.errors import ConfigError
from jaxllm.models.layers.moe import Routing
from jaxllm.objectives.config import Routers
from jaxllm.objectives.next_token import router_losses
from jaxllm.train.config import Adafactor, AdamW, Muon
from jaxllm.train.optimizers import build, decay_mask
from jaxllm.train.step import init_state, make_eval_step, make_train_step, place_batch, set_up

FFN = {"kind": "moe", "experts": 4, "top_k": 2, "mlp": 32}
SILENT = "objective.routers={balance: 0, z_loss: 0}"


def mixture(*overrides: str, **ffn):
    """The run of tests/train/test_step.py, every other layer a mixture."""
    return run_config(*overrides, pattern=[{}, {"ffn": FFN | ffn}])


# --- the loss --------------------------------------------------------------------------------------------------------


def test_routers_add_their_weights_times_means_over_mixtures():
    routing = Routing(jnp.array([1.0, 2.0]), jnp.array([4.0, 8.0]), jnp.array([0.0, 0.5]), jnp.array([1.0, 3.0]))
    more, means = router_losses(Routers(balance=0.1, z_loss=0.01), routing)
    np.testing.assert_allclose(more, 0.1 * 1.5 + 0.01 * 6)
    assert {name: float(x) for name, x in means.items()} == {"balance": 1.5, "z": 6, "dropped": 0.25, "busiest": 2}


def test_what_is_minimised_and_measured_has_the_routers_share():
    cfg = mixture("objective.z_loss=0", "objective.routers={balance: 0.3, z_loss: 0.02}")
    setup = set_up(cfg, jax.devices()[:1])
    sums = make_eval_step(setup)(init_state(setup).params, place_batch(setup, random_batch()))
    mean = {name: float(s / w) for name, (s, w) in sums.items()}
    assert mean["loss"] == pytest.approx(
        mean["xent"] + 0.3 * mean["router_balance"] + 0.02 * mean["router_z"], rel=1e-5
    )
    assert mean["router_balance"] >= 1 and 1 <= mean["router_busiest"] <= 2 and mean["router_dropped"] == 0


@pytest.mark.slow
def test_the_balance_loss_brings_a_skewed_router_back_while_the_loss_falls():
    """Fedus et al. 2021, arXiv:2101.03961, section 2.2."""

    def trained(balance: float) -> tuple[list[float], list[float]]:
        how = ("optimizer={kind: adamw, learning_rate: 1e-2}", f"objective.routers.balance={balance}")
        setup = set_up(mixture(*how, top_k=1, router={"kind": "softmax", "bias": True}), jax.devices()[:1])
        state, step = init_state(setup), make_train_step(setup)
        skewed = {"blocks.1.ffn.b_router": jnp.array([[3.0, 0, 0, 0]])}  # nearly all tokens choose expert 0
        state = state._replace(params=state.params | skewed)
        losses, busiest = [], []
        for _ in range(30):
            state, sums = step(state, place_batch(setup, random_batch()))
            losses.append(float(sums["xent"][0] / sums["xent"][1]))
            busiest.append(float(sums["router_busiest"][0] / sums["router_busiest"][1]))
        return losses, busiest

    (losses, balanced), (_, left_alone) = trained(0.3), trained(0.0)
    assert losses[-1] < 0.7 * losses[0]
    assert balanced[0] == left_alone[0] > 3
    assert balanced[-1] < 1.6 and balanced[-1] < left_alone[-1]


# --- meshes ----------------------------------------------------------------------------------------------------------

SLOTS = {"kind": "slots", "slots": 5}


@pytest.mark.parametrize(
    ("overrides", "ffn"),
    [
        pytest.param(
            ("mesh.expert=4",),
            {"shared": {"mlp": 16, "gate": True}, "router": {"kind": "softmax", "bias": True}},
            marks=pytest.mark.slow,
        ),
        pytest.param(("mesh.expert=2", "mesh.tensor=2"), {"bias": True}, marks=pytest.mark.slow),
        pytest.param(("mesh.fsdp=2", "mesh.expert=2", "accumulate=2"), {}, marks=pytest.mark.slow),
        pytest.param(("mesh.context=4",), {"capacity": SLOTS, "router": "sigmoid"}, marks=pytest.mark.slow),
        pytest.param(
            ("mesh.pipe=2", "accumulate=2", "model.num_layers=4", SILENT), {"capacity": SLOTS}, marks=pytest.mark.slow
        ),
        pytest.param(("offload.optimizer=true",), {"jitter": 0.2}, marks=pytest.mark.slow),
    ],
    ids=["expert", "expert-tensor", "fsdp-expert", "context", "pipe", "offload"],
)
def test_a_mixture_trains_on_every_mesh_as_on_one_device(overrides, ffn):
    alone = [o for o in overrides if o.startswith(("accumulate", "objective", "model"))]
    assert_same_run(mixture(*overrides, **ffn), mixture(*alone, **ffn))


def test_devices_hold_their_share_of_the_experts():
    setup = set_up(mixture("mesh.expert=4"), jax.devices()[:4])
    w = setup.state.params["blocks.1.ffn.experts.w_up"]
    assert w.shape == (1, 4, 32, 32) and w.sharding.shard_shape(w.shape) == (1, 1, 32, 32)
    router = setup.state.params["blocks.1.ffn.w_router"]
    assert router.sharding.shard_shape(router.shape) == (1, 32, 1)


def test_rows_of_a_ring_keep_their_order_where_experts_take_tokens_as_they_come():
    for capacity, balanced in ((None, True), (SLOTS, False)):
        assert set_up(mixture("mesh.context=4", capacity=capacity), jax.devices()[:4]).cfg.context.balanced == balanced


@pytest.mark.parametrize(
    ("overrides", "ffn", "reason"),
    [
        (("mesh.pipe=2", "accumulate=2"), {}, "hears nothing of the routers before it; set objective.routers.balance"),
        (("mesh.pipe=2", "accumulate=2", SILENT, "pipeline.schedule={kind: gpipe, slices: 2}"), {"capacity": SLOTS},
         "experts take tokens of whole rows up to their capacity; set ffn.capacity to null"),
        (("mesh.pipe=2", "accumulate=2", SILENT, "pipeline.schedule={kind: gpipe, slices: 2}"), {"jitter": 0.1},
         "jitter is drawn for whole rows; set ffn.jitter to 0"),
    ],
)  # fmt: skip
def test_what_a_pipeline_cannot_do_for_mixtures_is_refused(overrides, ffn, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        mixture(*overrides, "model.num_layers=4", **ffn)


def test_experts_that_do_not_divide_over_their_devices_are_refused():
    with pytest.raises(ConfigError, match="experts=3 does not divide over mesh axis expert of 2 devices"):
        set_up(mixture("mesh.expert=2", experts=3), jax.devices()[:2])
    assert ROWS % 2 == 0  # rows do


# --- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg",
    [AdamW(learning_rate=0.01), Muon(learning_rate=0.01), Adafactor(learning_rate=0.01, min_dim=2)],
    ids=lambda cfg: cfg.kind,
)
def test_every_expert_is_updated_as_if_it_stood_alone(cfg):
    axes = {"experts.w_up": ("layers", "experts", "embed", "mlp"), "experts.b_up": ("layers", "experts", "mlp")}
    sizes = {"layers": 2, "experts": 3, "embed": 4, "mlp": 6}
    rng = np.random.default_rng(0)

    def drawn():  # experts of very different sizes: a mean over them would show
        shape = {n: [sizes[a] for a in ax] for n, ax in axes.items()}
        return {n: jnp.asarray(rng.normal(size=s) * 10.0 ** rng.integers(-2, 2, (*s[:2], *[1] * (len(s) - 2))), jnp.float32)
                for n, s in shape.items()}  # fmt: skip

    params, grads = drawn(), drawn()

    @functools.partial(jax.jit, static_argnums=2)
    def after(params, grads, alone):
        tx = build(cfg, optax.constant_schedule(0.01), {n: ax[2:] if alone else ax for n, ax in axes.items()})
        return optax.apply_updates(params, tx.update(grads, tx.init(params), params)[0])

    together = after(params, grads, False)
    for layer in range(2):
        for e in range(3):
            alone = after(*({n: x[layer, e] for n, x in tree.items()} for tree in (params, grads)), True)
            for name in axes:
                np.testing.assert_allclose(together[name][layer, e], alone[name], rtol=2e-5, atol=1e-7)


def test_routers_and_experts_decay_and_their_biases_do_not():
    axes = {
        "w_router": ("embed", "experts"), "b_router": ("experts",), "w_shared": ("embed",),
        "experts.w_down": ("experts", "mlp", "embed"), "experts.b_down": ("experts", "embed"),
    }  # fmt: skip
    assert {name for name, decays in decay_mask(axes).items() if decays} == {"w_router", "experts.w_down"}

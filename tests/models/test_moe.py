"""Mixtures against a slow loop over tokens and experts, against transformers, and against what papers say of them."""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from pydantic import ValidationError
from test_count import products, traced

from jaxllm.core import config
from jaxllm.core.errors import ConfigError
from jaxllm.models.config import Block, DecoderConfig
from jaxllm.models.config import MoE as MoEConfig
from jaxllm.models.count import active, flops_per_token, parameters
from jaxllm.models.layers.ffn import activate
from jaxllm.models.layers.moe import MoE, Routing, room
from jaxllm.models.module import abstract, create, merge, split

D, B, T = 8, 3, 7
few = settings(max_examples=10, deadline=None, derandomize=True, database=None)


@st.composite
def mixtures(draw) -> MoEConfig:
    """Any valid mixture, tiny."""
    count = draw(st.integers(1, 5))
    shared = {"mlp": 5, "gate": draw(st.booleans())}
    router = {
        "kind": draw(st.sampled_from(["softmax", "sigmoid"])), "renormalise": draw(st.booleans()),
        "bias": draw(st.booleans()), "scale": draw(st.sampled_from([1.0, 2.5])),
    }  # fmt: skip
    capacity = [None, {"kind": "factor", "factor": 0.7}, {"kind": "factor"}, {"kind": "slots", "slots": 2}]
    return MoEConfig.model_validate({
        "experts": count, "top_k": draw(st.integers(1, count)), "mlp": draw(st.integers(1, 9)), "glu": draw(st.booleans()),
        "activation": draw(st.sampled_from(["silu", "relu", "gelu"])), "bias": draw(st.booleans()), "router": router,
        "shared": draw(st.none() | st.just(shared)), "capacity": draw(st.sampled_from(capacity)),
    })  # fmt: skip


def layer(cfg: MoEConfig, seed: int = 0) -> MoE:
    """A mixture with noise in every weight, biases too."""
    block = Block(ffn=cfg)
    model = DecoderConfig(embed=D, num_layers=1, block=block, position="none")
    shaped = nnx.eval_shape(lambda: MoE(model, block, rngs=nnx.Rngs(0)))
    graphdef, state, _ = nnx.split(shaped, nnx.Param, ...)
    shapes = {".".join(map(str, path)): x.get_value().shape for path, x in nnx.to_flat_state(state)}
    rng = np.random.default_rng(seed)
    return made(graphdef, {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()})


def made(graphdef: Any, weights: dict) -> MoE:
    flat = [(tuple(n.split(".")), nnx.Param(jnp.asarray(x))) for n, x in weights.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


@jax.jit
def computed(moe: MoE, x: Any, real: Any, key: Any = None) -> tuple:
    return moe(x, real, key)


def rows(seed: int = 0) -> tuple[Any, Any]:
    """Tokens, and which of them are no padding."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32), jnp.asarray(rng.random((B, T)) < 0.8)


def slow(moe: MoE, x_BTD: np.ndarray, real_BT: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """One token after the other, one expert after the other, in float64."""
    cfg = moe.cfg
    w = {n: np.asarray(x, np.float64) for n, x in split(moe)[1].items()}

    def feed_forward(x, name, e=...):
        of = lambda n: w[f"{name}.{n}"][e] if f"{name}.{n}" in w else 0.0
        act = lambda h: np.asarray(activate(cfg.activation, jnp.asarray(h, jnp.float32)), np.float64)
        up = x @ of("w_up") + of("b_up")
        hidden = act(x @ of("w_gate") + of("b_gate")) * up if cfg.glu else act(up)
        return hidden @ of("w_down") + of("b_down")

    y_BTD = np.zeros(x_BTD.shape)
    used, probability, z, dropped = np.zeros(cfg.experts), np.zeros(cfg.experts), 0.0, 0
    for b in range(B):
        taken = np.zeros(cfg.experts, int)
        for t in range(T):
            x = x_BTD[b, t].astype(np.float64)
            logits = x @ w["w_router"] + w.get("b_router", 0)
            exp = np.exp(logits)
            scores = exp / exp.sum() if cfg.router.kind == "softmax" else 1 / (1 + np.exp(-logits))
            best = np.argsort(-scores, kind="stable")[: cfg.top_k]
            for e in best:
                taken[e] += real_BT[b, t]
                if cfg.capacity is not None and taken[e] > room(cfg, T):
                    dropped += real_BT[b, t]
                    continue
                weight = scores[e] / scores[best].sum() if cfg.router.renormalise else scores[e]
                y_BTD[b, t] += cfg.router.scale * weight * feed_forward(x, "experts", e)
            if cfg.shared:
                gate = 1 / (1 + np.exp(-x @ w["w_shared"])) if cfg.shared.gate else 1
                y_BTD[b, t] += gate * feed_forward(x, "shared")
            if real_BT[b, t]:
                used[best] += 1
                probability += scores / scores.sum()
                z += np.log(exp.sum()) ** 2
    n = real_BT.sum()
    share = used / used.sum()
    return y_BTD, {
        "balance": cfg.experts * (share * probability / n).sum(), "z": z / n, "dropped": dropped / (n * cfg.top_k),
        "busiest": cfg.experts * share.max(),
    }  # fmt: skip


@few
@given(mixtures(), st.integers(0, 999))
def test_a_mixture_is_a_loop_over_tokens_and_experts(cfg, seed):
    moe, (x, real) = layer(cfg, seed), rows(seed)
    y, routing = computed(moe, x, real)
    wanted, watched = slow(moe, np.asarray(x), np.asarray(real))
    # padding is computed, and may take no room from others, but what it gets nobody sees
    np.testing.assert_allclose(np.asarray(y)[real], wanted[np.asarray(real)], rtol=2e-4, atol=1e-3)
    for name, value in routing._asdict().items():
        np.testing.assert_allclose(value, watched[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_choosing_all_experts_is_the_whole_mixture():
    """Shazeer et al. 2017, arXiv:1701.06538, equation 1, with G = softmax."""
    moe, (x, real) = layer(MoEConfig(experts=4, top_k=4, mlp=6)), rows()
    w = split(moe)[1]
    gate_BTE = jax.nn.softmax(x @ w["w_router"])
    h_BTEF = jax.nn.silu(jnp.einsum("BTD,EDF->BTEF", x, w["experts.w_gate"]))
    h_BTEF = h_BTEF * jnp.einsum("BTD,EDF->BTEF", x, w["experts.w_up"])
    wanted = jnp.einsum("BTE,BTEF,EFD->BTD", gate_BTE, h_BTEF, w["experts.w_down"])
    np.testing.assert_allclose(computed(moe, x, real)[0], wanted, rtol=1e-4, atol=1e-4)


def test_weights_of_the_chosen_renormalised_are_the_softmax_over_their_logits():
    """Mixtral, arXiv:2401.04088, section 2.1: Softmax(TopK(x W_g))."""
    moe, (x, real) = layer(MoEConfig(experts=5, top_k=2, mlp=6)), rows()
    logits_BTE = np.asarray(moe.logits(x, None))
    lowest = np.sort(logits_BTE, -1)[..., -2:-1]
    gate_BTE = jax.nn.softmax(np.where(logits_BTE >= lowest, logits_BTE, -np.inf))
    np.testing.assert_allclose(computed(moe, x, real)[0], moe.experts(x, gate_BTE), rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_router_and_the_chosen_experts_and_no_other():
    cfg = MoEConfig(experts=4, top_k=1, mlp=6, router={"kind": "softmax", "renormalise": False})
    moe, (x, real) = layer(cfg), rows()
    graphdef, weights = split(moe)

    def y(weights):
        return computed(made(graphdef, weights), x, real)[0]

    check_grads(y, (weights,), order=1, modes=("rev",), atol=2e-2, rtol=2e-2, eps=1e-3)
    never = weights | {
        "w_router": weights["w_router"].at[:, 3].set(weights["w_router"][:, 1])
    }  # of equal ones the first
    grads = jax.grad(lambda w: jnp.sum(jnp.square(y(w))))(never)
    chosen = {int(e) for e in np.argmax(np.asarray(made(graphdef, never).logits(x, None)), -1).ravel()}
    assert chosen == {0, 1, 2}
    for name in ("w_up", "w_gate", "w_down"):
        assert [bool(np.any(g)) for g in np.asarray(grads[f"experts.{name}"])] == [True, True, True, False]
    assert np.any(grads["w_router"])


# --- capacity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "k", "length", "expected"),
    [(None, 2, 10, 10), ({"kind": "slots", "slots": 3}, 1, 10, 3), ({"kind": "factor", "factor": 1.25}, 1, 64, 10),
     ({"kind": "factor", "factor": 1.25}, 2, 64, 20), ({"kind": "factor", "factor": 1.0}, 1, 1, 1)],
)  # fmt: skip
def test_capacity_is_the_even_share_times_its_factor(capacity, k, length, expected):
    """Switch, arXiv:2101.03961, equation 3: tokens / experts x factor, rounded up."""
    assert room(MoEConfig(experts=8, top_k=k, capacity=capacity), length) == expected
    if capacity and capacity["kind"] == "factor":
        assert expected == math.ceil(k * length / 8 * capacity["factor"])


def test_tokens_over_capacity_are_the_last_ones_and_pass_through_the_residual():
    cfg = MoEConfig(experts=4, top_k=1, mlp=6, capacity={"kind": "slots", "slots": 2})
    moe = layer(cfg)
    x = jnp.ones((1, 6, D))  # all choose alike
    real = jnp.array([[False, True, True, True, True, True]])  # padding takes no room
    y, routing = computed(moe, x, real)
    assert [bool(np.any(row)) for row in np.asarray(y[0, 1:])] == [True, True, False, False, False]
    assert float(routing.dropped) == pytest.approx(3 / 5) and float(routing.busiest) == 4
    # a token's fate does not hang on later ones
    np.testing.assert_array_equal(computed(moe, x.at[0, 4:].set(-1), real)[0][0, :4], y[0, :4])
    block = {"attention": {"num_heads": 1}, "ffn": cfg.model_dump()}
    model = DecoderConfig.model_validate({"embed": D, "num_layers": 1, "block": block, "vocab": 9, "final_norm": False})
    weights = weights_of(model) | {"blocks.0.attention.w_o": jnp.zeros((1, 1, D, D))}
    ids = jnp.full((1, 6), 5)
    hidden = jax.jit(lambda m: m.hidden(ids, jnp.arange(6)[None], jnp.ones_like(ids)))(
        merge(abstract(model)[0], weights)
    )
    np.testing.assert_array_equal(hidden[0, 2:], weights["embedding"][ids[0, 2:]])
    assert not np.array_equal(hidden[0, 1], hidden[0, 2])


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [64, 2])
def test_a_switch_layer_is_that_of_transformers(capacity):
    """Top-1, its probability multiplies the output, capacity in the order of tokens (arXiv:2101.03961)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    torch.manual_seed(0)
    theirs = SwitchTransformersSparseMLP(transformers.SwitchTransformersConfig(
        d_model=D, d_ff=12, num_experts=3, expert_capacity=capacity, dropout_rate=0.0, router_bias=True,
        router_jitter_noise=0.1,
    )).eval()  # fmt: skip
    w = {n: x.detach().numpy() for n, x in theirs.state_dict().items()}
    graphdef, weights = split(layer(MoEConfig.model_validate({
        "experts": 3, "top_k": 1, "mlp": 12, "activation": "relu", "glu": False, "jitter": 0.1,
        "router": {"kind": "softmax", "renormalise": False, "bias": True},
        "capacity": {"kind": "slots", "slots": capacity},
    })))  # fmt: skip
    names = [f"experts.expert_{e}" for e in range(3)]
    given = {
        "w_router": w["router.classifier.weight"].T, "b_router": w["router.classifier.bias"],
        "experts.w_up": np.stack([w[f"{n}.wi.weight"].T for n in names]),
        "experts.w_down": np.stack([w[f"{n}.wo.weight"].T for n in names]),
    }  # fmt: skip
    assert given.keys() == weights.keys()
    moe, (x, _) = made(graphdef, given), rows()
    with torch.no_grad():
        wanted = theirs(torch.tensor(np.asarray(x))).numpy()
    y, routing = computed(moe, x, jnp.ones((B, T), bool))
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    assert (float(routing.dropped) > 0) == (capacity == 2)


def test_the_balance_is_that_of_transformers_over_k():
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    moe, (x, real) = layer(MoEConfig(experts=5, top_k=2, mlp=3)), rows()
    logits = torch.tensor(np.asarray(moe.logits(x, None)).reshape(B * T, 5))
    wanted = mixtral.load_balancing_loss_func((logits,), 5, 2, torch.tensor(np.asarray(real)).long())
    np.testing.assert_allclose(computed(moe, x, real)[1].balance, float(wanted) / 2, rtol=1e-5)


def test_the_balance_of_even_use_is_1():
    """Switch, arXiv:2101.03961, section 2.2: alpha times this is then alpha."""
    graphdef, weights = split(layer(MoEConfig(experts=D, top_k=1, mlp=3)))
    each_its_own = jnp.broadcast_to(5 * jnp.eye(D), (1, D, D))  # one token for each expert
    moe = made(graphdef, weights | {"w_router": jnp.eye(D)})
    balance = computed(moe, each_its_own, jnp.ones((1, D), bool))[1].balance
    np.testing.assert_allclose(balance, 1, rtol=1e-6)


# --- jitter ----------------------------------------------------------------------------------------------------------


def test_jitter_is_of_the_router_alone_and_in_training_alone():
    cfg = MoEConfig(experts=4, top_k=4, mlp=6, jitter=0.3)
    moe, (x, real) = layer(cfg), rows()
    still, key = layer(cfg.model_copy(update={"jitter": 0.0})), jax.random.key(0)
    np.testing.assert_array_equal(computed(moe, x, real)[0], computed(still, x, real)[0])
    np.testing.assert_array_equal(computed(still, x, real, key)[0], computed(still, x, real)[0])
    assert not np.array_equal(computed(moe, x, real, key)[0], computed(moe, x, real)[0])
    # experts see the input itself: with equal weights whatever the router says, nothing of the noise is left
    graphdef, weights = split(moe)
    even = made(graphdef, weights | {"w_router": jnp.zeros_like(weights["w_router"])})
    np.testing.assert_array_equal(computed(even, x, real, key)[0], computed(even, x, real)[0])
    noise = np.asarray(moe.logits(x, key)) / np.asarray(moe.logits(x, None))
    assert len(np.unique(noise.round(4))) > B * T


def test_a_model_with_jitter_draws_when_it_trains():
    cfg = DecoderConfig.model_validate({"block": {"ffn": {"kind": "moe", "jitter": 0.01}}})
    assert cfg.draws and not DecoderConfig.model_validate({"block": {"ffn": "moe"}}).draws
    assert DecoderConfig.model_validate({"dropout": {"residual": 0.1}}).draws


# --- in a decoder ----------------------------------------------------------------------------------------------------

MIXED = {
    "vocab": 23, "embed": 16, "num_layers": 5, "context": 32,
    "block": {"attention": {"num_heads": 2}, "ffn": {"mlp": 24}},
    "pattern": [{"ffn": {"kind": "moe", "experts": 4, "mlp": 10, "shared": {"mlp": 6, "gate": True}}}, {}],
}  # fmt: skip


TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 23, (2, 12)))
PLACES = jnp.arange(12)[None] + 0 * TOKENS


@functools.cache
def weights_of(cfg: DecoderConfig) -> dict:
    return jax.jit(functools.partial(create, cfg))(jax.random.key(0))


def told(cfg: DecoderConfig, **how: Any) -> tuple[Any, list[Routing]]:
    """Logits, and what the model tells of its routers."""
    graphdef, _, _ = abstract(cfg, **how)

    @jax.jit
    def run(params):
        seen: list[Routing] = []
        return merge(graphdef, params)(TOKENS, PLACES, jnp.ones_like(TOKENS), watch=seen.append), seen

    return run(weights_of(cfg))


@pytest.mark.slow
def test_every_other_layer_may_be_a_mixture_and_each_tells_what_its_router_did():
    cfg = DecoderConfig.model_validate(MIXED)
    assert [cfg.layer(i).ffn.kind for i in range(5)] == ["moe", "dense", "moe", "dense", "moe"]
    assert cfg.layer(1).ffn.mlp == 24
    y, (routing,) = told(cfg)
    assert routing.balance.shape == (3,) and np.all(np.asarray(routing.balance) > 0.9)
    for how in ({"scan": False}, {"remat": "full"}):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (y, [routing]), told(cfg, **how)
        )


def test_a_dense_model_tells_nothing():
    assert told(DecoderConfig.model_validate(MIXED | {"pattern": (), "num_layers": 1}))[1] == []


def test_a_cached_decode_is_the_full_forward_and_left_padding_changes_nothing():
    cfg = DecoderConfig.model_validate(MIXED)
    model, (whole, _), pad = merge(abstract(cfg)[0], weights_of(cfg)), told(cfg), 3
    prefill = jax.jit(lambda m, *row: m.prefill(*row, capacity=12 + pad))
    decode = jax.jit(lambda m, *state: m.decode(*state))
    logits, cache = prefill(model, jnp.pad(TOKENS, ((0, 0), (pad, 0)))[:, : 8 + pad], jnp.full(2, pad))
    for t in range(8, 12):
        np.testing.assert_allclose(logits, whole[:, t - 1], atol=1e-4)
        logits, cache = decode(model, TOKENS[:, t], cache)
    np.testing.assert_allclose(logits, whole[:, 11], atol=1e-4)


# --- counts ----------------------------------------------------------------------------------------------------------


@few
@given(mixtures())
def test_counted_parameters_and_flops_are_those_of_the_built_model(moe):
    tree = {"vocab": 11, "embed": 8, "num_layers": 3, "block": {"attention": {"num_heads": 2}, "ffn": {"mlp": 7}}}
    cfg = DecoderConfig.model_validate(tree | {"pattern": [{}, {"ffn": moe.model_dump()}]})
    shapes = abstract(cfg)[1]
    assert parameters(cfg) == sum(math.prod(x.shape) for x in shapes.values())
    of_experts = sum(math.prod(x.shape) for n, x in shapes.items() if ".experts." in n)
    assert parameters(cfg) - active(cfg) == of_experts * (moe.experts - moe.top_k) // moe.experts
    loss, args = traced(cfg, 2, 6)
    dense = flops_per_token(cfg, 6, causal=False, chosen=False)
    assert products(jax.make_jaxpr(loss)(*args).jaxpr) == 2 * 6 * dense.forward
    assert products(jax.make_jaxpr(jax.grad(loss))(*args).jaxpr) == 2 * 6 * dense.train
    idle = 2 * (moe.experts - moe.top_k) * (2 + moe.glu) * 8 * moe.mlp  # of its one mixture
    assert dense.forward - flops_per_token(cfg, 6, causal=False).forward == idle


@pytest.mark.parametrize(
    ("name", "count", "used"), [("mixtral_8x7b", 46_702_792_704, 12.9e9), ("mixtral_8x22b", 140_620_634_112, 39e9)]
)
def test_published_mixtures_have_their_published_sizes(name, count, used):
    """Tensors on the hub, mistralai/Mixtral-8x7B-v0.1 and 8x22B-v0.1; active: mistral.ai/news/mixtral-of-experts, ...-8x22b."""
    cfg = config.load(DecoderConfig, Path(__file__).parents[2] / f"configs/models/{name}.yaml")
    assert parameters(cfg) == count
    assert active(cfg) == pytest.approx(used, rel=5e-3)


def test_glam_has_its_published_sizes():
    """Du et al. 2021, arXiv:2112.06905, table 4: 64B/64E has 1.2T parameters, of which a token uses 96.6B.

    The counts hold for gates in the dense layers and none in the experts.
    """
    moe = {"kind": "moe", "experts": 64, "top_k": 2, "mlp": 32768, "glu": False, "activation": "gelu"}
    cfg = DecoderConfig.model_validate({
        "vocab": 256_000, "embed": 8192, "num_layers": 64, "tie": True, "position": "none",
        "block": {"attention": {"num_heads": 128, "head_dim": 128}, "ffn": {"mlp": 32768, "activation": "gelu"}},
        "pattern": [{}, {"ffn": moe}],
    })  # fmt: skip
    assert active(cfg) == pytest.approx(96.6e9, rel=1e-3)
    assert round(parameters(cfg) / 1e12, 1) == 1.2


# --- configs ---------------------------------------------------------------------------------------------------------


def test_a_feed_forward_without_a_kind_is_dense():
    assert Block.model_validate({"ffn": {"mlp": 7}}).ffn.kind == "dense"
    cfg = config.parse(DecoderConfig, {"block": {"ffn": {"mlp": 7}}}, ["block.ffn.kind=moe", "block.ffn.experts=3"])
    assert cfg.block.ffn.kind == "moe" and cfg.block.ffn.experts == 3
    with pytest.raises(ConfigError, match=r"block.ffn.expert: no such field; did you mean 'experts'"):
        config.parse(DecoderConfig, {"block": {"ffn": {"kind": "moe", "expert": 7}}})


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"ffn": {"kind": "moe", "experts": 2, "top_k": 3}}, "top_k=3 must not be above experts=2"),
        ({"ffn": "moe", "placement": "subln"}, "placement=subln puts a norm into the feed-forward"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(block, reason):
    with pytest.raises(ValidationError, match=reason):
        Block.model_validate(block)

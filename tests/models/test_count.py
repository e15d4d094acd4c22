import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from jaxllm.core.errors import ConfigError
from jaxllm.models.config import Attention, DecoderConfig, EncoderConfig, EncoderDecoderConfig
from jaxllm.models.count import flops_per_token, non_embedding, parameters, parts, visible_pairs
from jaxllm.models.masks import Causal, Coords, Full, Prefix, Window
from jaxllm.models.module import abstract, merge

NORMS = st.sampled_from(["rmsnorm", "layernorm", {"kind": "layernorm", "bias": False}])
ATTENTION = st.fixed_dictionaries({
    "num_heads": st.just(4), "num_kv_heads": st.sampled_from([None, 1, 2]), "head_dim": st.sampled_from([None, 6]),
    "bias": st.booleans(), "out_bias": st.booleans(), "qk_norm": st.none() | NORMS,
    "window": st.none() | st.integers(1, 9),
})  # fmt: skip
FFN = st.fixed_dictionaries({
    "mlp": st.integers(1, 40), "glu": st.booleans(), "bias": st.booleans(),
    "activation": st.sampled_from(["silu", "gelu"]),
})  # fmt: skip


@st.composite
def decoders(draw) -> DecoderConfig:
    """Any valid decoder, tiny."""
    block = {
        "norm": draw(NORMS), "attention": draw(ATTENTION), "ffn": draw(FFN),
        "placement": draw(st.sampled_from(
            ["pre", "post", "sandwich", {"kind": "parallel", "norms": 1},
            {"kind": "parallel", "norms": 2}, "subln", "deepnorm"]
        )),
    }  # fmt: skip
    pattern = [{"ffn": draw(FFN), "attention": draw(ATTENTION)} for _ in range(draw(st.integers(0, 2)))]
    return DecoderConfig.model_validate({
        "vocab": draw(st.integers(1, 50)), "context": 12, "embed": 16, "num_layers": draw(st.integers(2, 5)),
        "block": block, "pattern": pattern, "embedding_norm": draw(st.none() | NORMS),
        "position": draw(st.sampled_from(["none", "rope", "learned", "sinusoidal", "alibi"])),
        "final_norm": draw(st.booleans()), "tie": draw(st.booleans()), "head_bias": draw(st.booleans()),
        "query_layer": draw(st.none() | st.just({"attention": draw(ATTENTION), "ffn": draw(FFN)})),
    })  # fmt: skip


@given(decoders())
def test_counted_parameters_are_those_of_the_built_model(cfg):
    shapes = abstract(cfg)[1]
    assert parameters(cfg) == sum(math.prod(x.shape) for x in shapes.values())
    tables = {
        name: math.prod(shapes[name].shape)
        for name in ("embedding", "positions", "query_positions", "head", "head_bias")
        if name in shapes
    }
    assert {name: n for name, n in parts(cfg).items() if name in tables} == tables
    assert non_embedding(cfg) == parameters(cfg) - sum(tables.values())


def products(jaxpr) -> int:
    """FLOPs of all matrix products in a jaxpr without loops."""
    total = 0
    for eqn in jaxpr.eqns:
        assert eqn.primitive.name != "while"
        if eqn.primitive.name == "dot_general":
            contracted = [eqn.invars[0].aval.shape[d] for d in eqn.params["dimension_numbers"][0][0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(contracted)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(products(inner) for inner in jaxprs_in_params(eqn.params))
    return total


def traced(cfg: DecoderConfig, batch: int, length: int):
    """The loss of a batch and its arguments as shapes."""
    graphdef, shapes, _ = abstract(cfg, scan=False)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def loss(params, tokens, positions, documents):
        return jnp.square(merge(graphdef, params)(tokens, positions, documents)).mean()

    return loss, (shapes, tokens, tokens, tokens)


@settings(max_examples=10)
@given(decoders(), st.integers(1, 12))
def test_counted_flops_are_those_of_every_product_in_forward_and_backward(cfg, length):
    loss, args = traced(cfg, 2, length)
    counted = flops_per_token(cfg, length, causal=False)
    assert products(jax.make_jaxpr(loss)(*args).jaxpr) == 2 * length * counted.forward
    assert products(jax.make_jaxpr(jax.grad(loss))(*args).jaxpr) == 2 * length * counted.train


@pytest.mark.parametrize("tree", [
    {"block": {"attention": {"num_heads": 2}, "ffn": {"mlp": 512}}},
    {"block": {"attention": {"num_heads": 2, "num_kv_heads": 1}, "ffn": {"mlp": 768, "glu": False}}, "tie": True},
])  # fmt: skip
def test_counted_flops_are_the_compilers_within_its_elementwise_work(tree):
    """XLA counts one for each elementwise operation too: below 5 % at this width, and less at any larger one."""
    cfg = DecoderConfig.model_validate({"vocab": 512, "context": 32, "embed": 256, "num_layers": 3} | tree)
    loss, args = traced(cfg, 2, 32)
    counted = flops_per_token(cfg, 32, causal=False)
    for f, expected in ((loss, counted.forward), (jax.value_and_grad(loss), counted.train)):
        compiled = jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
        assert 1 <= compiled / (2 * 32 * expected) < 1.05


def test_training_costs_what_palm_says():
    """6 N + 12 L H Q T (arXiv:2204.02311, appendix B), N the weights that multiply."""
    cfg = DecoderConfig.model_validate({
        "vocab": 1000, "embed": 64, "num_layers": 7,
        "block": {"attention": {"num_heads": 4, "head_dim": 24}, "ffn": {"mlp": 96}},
    })  # fmt: skip
    weights = 7 * (4 * 64 * 96 + 3 * 64 * 96) + 64 * 1000
    assert flops_per_token(cfg, 128, causal=False).train == 6 * weights + 12 * 7 * 4 * 24 * 128
    half = flops_per_token(cfg, 128).train - 6 * weights
    assert half == 12 * 7 * 4 * 24 * 129 / 2


@pytest.mark.parametrize(
    "mask", [Causal(), Full(), Window(left=3, right=2), Causal() | Prefix(), Causal() & Window(left=2)]
)
@pytest.mark.parametrize(("window", "length"), list(itertools.product([None, 1, 4], [1, 3, 9])))
def test_pairs_are_those_that_mask_and_window_let_see(mask, window, length):
    index = np.arange(length)
    seen = np.broadcast_to(
        mask.visible(Coords(index[:, None], 1, False), Coords(index[None], 1, False)), (length, length)
    )
    if window:
        seen = seen & (index[:, None] - index[None] < window)
    assert visible_pairs(Attention(mask=mask, window=window), length) == seen.sum()


def test_windows_make_long_sequences_linear():
    cfg = DecoderConfig.model_validate({"vocab": 8, "num_layers": 2, "block": {"attention": {"window": 16}}})
    assert flops_per_token(cfg, 1 << 20).train == pytest.approx(flops_per_token(cfg, 1 << 14).train, rel=1e-3)
    assert flops_per_token(cfg, 1 << 20, causal=False).train > 10 * flops_per_token(cfg, 1 << 14, causal=False).train


@pytest.mark.parametrize(("count", "tree"), [
    (124_439_808, {  # GPT-2 small, as published on the Hugging Face hub
        "vocab": 50257, "context": 1024, "embed": 768, "num_layers": 12, "position": "learned", "tie": True,
        "block": {"norm": "layernorm", "attention": {"num_heads": 12, "bias": True, "out_bias": True},
                  "ffn": {"mlp": 3072, "glu": False, "bias": True}},
    }),
    (6_738_415_616, {  # LLaMA 7B
        "vocab": 32000, "embed": 4096, "num_layers": 32,
        "block": {"attention": {"num_heads": 32}, "ffn": {"mlp": 11008}},
    }),
    (8_030_261_248, {  # Llama 3 8B
        "vocab": 128256, "embed": 4096, "num_layers": 32,
        "block": {"attention": {"num_heads": 32, "num_kv_heads": 8}, "ffn": {"mlp": 14336}},
    }),
])  # fmt: skip
def test_published_models_have_their_published_size(count, tree):
    assert parameters(DecoderConfig.model_validate(tree)) == count


def test_a_model_without_vocabulary_cannot_be_counted():
    with pytest.raises(ConfigError, match="model.vocab"):
        parameters(DecoderConfig())


ENCODER = {
    "kind": "encoder", "vocab": 50, "context": 20, "embed": 16, "num_layers": 2, "segments": 2, "tasks": 3, "table": 12,
    "embedding_norm": "layernorm", "pooler": "tanh", "final_norm": False,
    "heads": ["mlm", "classification", "nsp", "sop", "rtd", {"kind": "tokens", "labels": 5}, "qa"],
    "convolution": {"groups": 2}, "relative": {"kind": "disentangled", "span": 4, "norm": True},
    "block": {
        "norm": "layernorm", "placement": "post", "attention": {"num_heads": 2, "bias": True, "key_bias": False},
        "ffn": {"mlp": 20, "glu": False, "bias": True},
    },
}  # fmt: skip
SIDE = {
    "vocab": 50,
    "embed": 16,
    "num_layers": 2,
    "block": {"attention": {"num_heads": 2, "bias": True}, "ffn": {"mlp": 9}},
}
WRITER = SIDE | {
    "block": SIDE["block"] | {"cross": {"num_heads": 2, "num_kv_heads": 1, "out_bias": True}},
    "head_bias": True,
}


@pytest.mark.parametrize(
    "model",
    [
        EncoderConfig.model_validate(ENCODER),
        EncoderConfig.model_validate(ENCODER | {"repeat": 3, "heads": [{"kind": "mlm", "tie": False}]}),
        EncoderDecoderConfig.model_validate({"encoder": SIDE, "decoder": WRITER}),
        EncoderDecoderConfig.model_validate({"encoder": SIDE, "decoder": WRITER | {"tie": True}, "share": False}),
        *(
            DecoderConfig.model_validate(SIDE | {"position": "none", "relative": relative})
            for relative in (
                "t5", {"kind": "t5", "shared": False}, "kerple", "sandwich", "fire", "tisa", "shaw", "xl",
                {"kind": "xl", "shared_biases": True}, "disentangled",
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_encoders_and_encoder_decoders_and_what_is_learned_of_distance_are_counted(model):
    shapes = abstract(model)[1]
    assert parameters(model) == sum(math.prod(x.shape) for x in shapes.values())

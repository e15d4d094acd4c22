import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.models.config import Block, DecoderConfig, Keep
from jaxllm.models.stack import row_tokens
from jaxllm.models.layers.attention import attend
from jaxllm.models.layers.block import Layer, drop
from jaxllm.models.layers.linear import lookup
from jaxllm.models.module import abstract, create, merge, split
from tests.marks import slow_but

T, V = 12, 32
BLOCK = {"attention": {"num_heads": 2}, "ffn": {"mlp": 24}}
ROPE_PART = {"kind": "rope", "fraction": 0.5, "interleaved": True}
LAYER_NORM = {"norm": "layernorm"}


def decoder(attention: dict | None = None, block: dict | None = None, **top) -> DecoderConfig:
    block = BLOCK | (block or {}) | {"attention": {"num_heads": 2} | (attention or {})}
    return DecoderConfig.model_validate(
        {"vocab": V, "context": 16, "embed": 16, "num_layers": 2} | top | {"block": block}
    )


PREFIX_LM = {"mask": {"kind": "some", "of": ["causal", "prefix"]}}
# Every position, placement and mask kind at least once.
DECODERS = {
    "rope": decoder(),
    "rope_part": decoder({"num_kv_heads": 1, "qk_norm": "rmsnorm"}, {"placement": "sandwich"}, position=ROPE_PART),
    "learned": decoder(
        {"bias": True, "out_bias": True}, LAYER_NORM | {"placement": "post"}, position="learned", final_norm=False
    ),
    "sinusoidal": decoder({"softcap": 2.0}, {"placement": "deepnorm"}, position="sinusoidal", init="xavier"),
    "alibi": decoder(None, {"placement": "parallel"}, position="alibi", embedding_norm="layernorm"),
    "none": decoder(None, {"placement": {"kind": "parallel", "norms": 2}}, position="none", tie=True, head_bias=True),
    "window": decoder({"window": 3}, {"placement": "subln"}, logit_softcap=3.0),
    "window_mask": decoder({"mask": {"kind": "window", "left": 2, "right": 1}}),
    "prefix_lm": decoder(PREFIX_LM, position="alibi"),
    "prefix": decoder({"mask": "prefix"}),
    "rope_2d": decoder(PREFIX_LM | {"log_scale": 3}, position="rope_2d"),
    "query_layer": decoder(None, LAYER_NORM, position="learned", query_layer=BLOCK | LAYER_NORM),
    "full": decoder({"mask": "full"}, position="learned"),
    "documents": decoder({"mask": {"kind": "all", "of": ["document", "causal"]}}),
    "pattern": decoder(pattern=[{"attention": {"window": 2}}, {"attention": PREFIX_LM}], num_layers=5),
}


@functools.cache
def running(name: str):
    """Random weights of `DECODERS[name]`, biases and scales included, and its compiled logits."""
    graphdef, shapes, _ = abstract(DECODERS[name])
    rng = np.random.default_rng(0)
    scale = {n: x.shape[-1] ** -0.5 if x.ndim > 1 else 0.5 for n, x in shapes.items()}
    params = {n: jnp.asarray(rng.normal(0, scale[n], x.shape), jnp.float32) for n, x in shapes.items()}
    return params, jax.jit(lambda p, tokens, *row: merge(graphdef, p)(tokens, *row[:2], prefix_BT=row[2]))


@functools.cache
def small(name: str = "rope", **choices):
    """(graphdef, fresh weights) of a named decoder."""
    cfg = DECODERS[name]
    return abstract(cfg, **choices)[0], create(cfg, jax.random.key(0))


def row(lengths: list[int], first: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """positions, documents and prefix marks (two tokens a document) of documents in a row, padding behind."""
    positions = [i for n in lengths for i in range(n)]
    documents = [1 + first + d for d, n in enumerate(lengths) for _ in range(n)]
    left = T - len(positions)
    positions = np.array(positions + [0] * left, np.int32)
    documents = np.array(documents + [0] * left, np.int32)
    return positions, documents, (positions < 2) & (documents > 0)


def plain_batch(batch: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (batch, T), 0, V)
    return tokens, jnp.broadcast_to(jnp.arange(T), (batch, T)), jnp.ones((batch, T), jnp.int32)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=8)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=3).filter(lambda n: sum(n) <= T), st.integers(0, 100))
def test_a_packed_document_gets_the_logits_it_gets_alone(name, lengths, seed):
    params, logits = running(name)
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, V, T)  # padding holds any tokens
    alone = rng.integers(0, V, (3, T))
    starts = np.cumsum([0, *lengths])
    for d, n in enumerate(lengths):
        alone[d, :n] = packed[starts[d] : starts[d] + n]
    rows = [np.stack(x) for x in zip(row(lengths), *(row([n], first=4) for n in lengths), strict=True)]
    y = logits(params, np.concatenate([packed[None], alone]).astype(np.int32), *rows)
    for d, n in enumerate(lengths):
        np.testing.assert_allclose(y[0, starts[d] : starts[d] + n], y[1 + d, :n], atol=2e-5)


def seen_in_one_layer(name: str, block: Block, documents: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    """[query, key] written out for the masks of `DECODERS`."""
    q, k = np.indices((T, T))
    causal, same = k <= q, documents[:, None] == documents[None]
    shown = {
        "window_mask": (q - k < 2) & (k - q <= 1), "full": np.ones((T, T), bool),
        "prefix_lm": causal | prefix[None], "prefix": prefix[None] | (q == k),
    }.get(name, causal | prefix[None] if block.attention.mask.kind == "some" else causal)  # fmt: skip
    return shown & same & (q - k < (block.attention.window or T))


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_reach_the_visible_tokens_and_no_other(name):
    cfg = DECODERS[name]
    params, _ = running(name)
    positions, documents, prefix = row([5, 6])
    model = merge(abstract(cfg)[0], params)

    def outputs(x_TD):
        hidden = model.layers(x_TD[None], tokens_of(positions, documents, prefix))[0][0]
        return hidden @ jnp.cos(jnp.arange(16.0))  # one number a token

    gradient = jax.jit(jax.jacrev(outputs))(jax.random.normal(jax.random.key(3), (T, 16)))
    reach = np.eye(T, dtype=bool)
    for i in range(cfg.num_layers):
        reach = (seen_in_one_layer(name, cfg.layer(i), documents, prefix).astype(int) @ reach) > 0
    assert np.array_equal(np.asarray(gradient != 0).any(-1), reach)


def test_a_query_layer_sees_what_came_before_and_its_weights_are_trained():
    params, logits = running("query_layer")
    tokens, *rest = (np.asarray(x[:1]) for x in plain_batch())
    changed = tokens.copy()
    changed[0, 7] = (changed[0, 7] + 1) % V
    one, two = (np.asarray(logits(params, x, *rest, np.zeros((1, T), bool)))[0] for x in (tokens, changed))
    moved = np.abs(one - two).max(-1) > 1e-6
    assert moved.tolist() == [False] * 7 + [True] * 5
    graphdef, fresh = small("query_layer", remat="full")
    grads = jax.jit(jax.grad(lambda p: jnp.square(merge(graphdef, p)(*plain_batch())).mean()))(fresh)
    for name in ("query_positions", "query_layer.attention.w_q", "query_layer.attention.w_k", "blocks.0.ffn.w_up"):
        assert np.abs(grads[name]).max() > 0
    assert not np.any(grads["query_positions"][T:])


def tokens_of(positions, documents, prefix):
    return row_tokens(*(jnp.asarray(x[None]) for x in (positions, documents, prefix)))


@functools.cache
def loss_and_gradients(**choices):
    """Compiled, of two groups of two layers and one left over; and weights."""
    graphdef, params = small("pattern", **choices)
    f = jax.jit(jax.value_and_grad(lambda p: jnp.square(merge(graphdef, p)(*plain_batch())).mean()))
    return f.lower(params).compile(), params


@functools.cache
def reference():
    compiled, params = loss_and_gradients(scan=True, remat="none")
    return compiled(params)


KEEP = (
    Keep(device=("q", "k", "v", "residual")), Keep(device=("attention", "gate", "up")), Keep(host=("input",)),
    Keep(device=("q", "k"), host=("input", "v", "residual")),
)  # fmt: skip


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    "policy",
    slow_but(["none", "full", "dots", "save_attention", "offload", *KEEP], "full", "save_attention", KEEP[1]),
    ids=str,
)
def test_neither_scan_nor_remat_changes_loss_or_gradients(policy, scan):
    compiled, params = loss_and_gradients(scan=scan, remat=policy)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), compiled(params), reference())


@pytest.mark.parametrize("scan", [True, False])
def test_the_compiler_does_not_undo_rematerialisation(scan):
    flops = {p: loss_and_gradients(scan=scan, remat=p)[0].cost_analysis()["flops"] for p in ("none", "full")}
    assert flops["full"] > 1.1 * flops["none"]


def test_a_pattern_of_equal_blocks_is_that_block():
    """A layer's weights depend on the seed and its number alone, and its number alone says where it stands."""
    plain = decoder(num_layers=5)
    grouped = decoder(num_layers=5, pattern=[{}, {}])
    a, b = (create(cfg, jax.random.key(0)) for cfg in (plain, grouped))
    for n, x in a.items():
        if n.startswith("blocks.0."):
            part = n.removeprefix("blocks.0.")
            layers = [b[f"blocks.{i % 2}.{part}"][i // 2] for i in range(4)] + [b[f"tail.0.{part}"]]
            assert np.array_equal(x, np.stack(layers))
        else:
            assert np.array_equal(x, b[n])
    logits = [merge(abstract(cfg)[0], p)(*plain_batch()) for cfg, p in ((plain, a), (grouped, b))]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_layers_start_different_and_deeper_models_with_the_same_layers():
    shallow, deep = (create(decoder(num_layers=n), jax.random.key(0))["blocks.0.ffn.w_up"] for n in (2, 4))
    assert np.array_equal(shallow, deep[:2])
    assert len({float(layer[0, 0]) for layer in deep}) == 4


def test_a_model_survives_split_and_merge():
    graphdef, params = small()
    again = split(merge(graphdef, params))[1]
    assert again.keys() == params.keys() and all(np.array_equal(again[n], x) for n, x in params.items())


BRANCHES = {
    "pre": lambda x, f, g, n: (y := x + f(n[0](x))) + g(n[1](y)),
    "post": lambda x, f, g, n: n[1]((y := n[0](x + f(x))) + g(y)),
    "sandwich": lambda x, f, g, n: (y := x + n[2](f(n[0](x)))) + n[3](g(n[1](y))),
    "parallel": lambda x, f, g, n: x + f(n[0](x)) + g(n[0](x)),
    "deepnorm": lambda x, f, g, n: n[1](math.sqrt(2) * (y := n[0](math.sqrt(2) * x + f(x))) + g(y)),  # (2L)^1/4, L = 2
}


@pytest.mark.parametrize("placement", BRANCHES)
def test_norms_stand_where_the_placement_puts_them(placement):
    cfg = decoder(None, LAYER_NORM | {"placement": placement}, pattern=[{}, {}], position="none")
    block = jax.tree.map(lambda x: x[0], merge(abstract(cfg)[0], create(cfg, jax.random.key(0))).blocks[0])
    norms = [getattr(block, n, None) for n in ("norm_attention", "norm_ffn", "post_attention", "post_ffn")]
    for i, norm in enumerate(filter(None, norms)):
        norm.bias[...] = jnp.full(16, 0.1 * (i + 1))  # so that no two are alike
    x = jax.random.normal(jax.random.key(1), (1, T, 16))
    tokens = tokens_of(*row([T]))

    def attention(h):
        q, kv = block.attention.queries(h, ()), block.attention.keys_values(h, ())
        return block.attention.mix(q, kv, tokens, tokens)

    y = block(x, Layer(tokens, ()), lambda new: (new, tokens))
    np.testing.assert_allclose(y, BRANCHES[placement](x, attention, block.ffn, norms), atol=1e-5)


def test_deepnorm_has_the_papers_constants():
    """Table 1 of the paper, decoder-only: alpha = (2M)^(1/4), beta = (8M)^(-1/4); M = 8: 2 and 0.3536."""
    assert (decoder(num_layers=8).deepnorm_alpha, decoder(num_layers=8).deepnorm_beta) == pytest.approx((2, 8**-0.5))
    assert (decoder(num_layers=1250).deepnorm_alpha, decoder(num_layers=1250).deepnorm_beta) == pytest.approx(
        (50**0.5, 0.1)
    )


D, F, L = 96, 160, 8  # and four query heads, two key and value heads, of 16
FAN_IN = np.array([D, D, D, 64, D, F, D]) ** -0.5  # of w_q, w_k, w_v, w_o, w_up, w_down, head
GLOROT = (2 / (np.array([D, D, D, 64, D, F, D]) + [64, 32, 32, D, F, D, 256])) ** 0.5
WANG, SMALL = 2 / (L * D**0.5), (2 / (5 * D)) ** 0.5
INITS = {  # scheme, placement, std of the embedding and of the seven weights above
    "fan_in": ("fan_in", "pre", 1.0, FAN_IN),
    "fan_in_scaled": ({"kind": "fan_in", "scale": 0.25, "embedding": 0.1}, "pre", 0.1, 0.5 * FAN_IN),
    "normal": ("normal", "pre", 0.02, [0.02] * 7),
    "gpt2": ({"kind": "normal", "scale_residual": True}, "pre", 0.02, [0.02, 0.02, 0.02, 0.005, 0.02, 0.005, 0.02]),
    "small": ("small", "pre", SMALL, [SMALL, SMALL, SMALL, WANG, SMALL, WANG, SMALL]),
    "xavier": ("xavier", "pre", D**-0.5, GLOROT),
    "deepnorm": ("xavier", "deepnorm", D**-0.5, GLOROT * [1, 1, *[8**-0.5] * 4, 1]),
    "subln": ("xavier", "subln", D**-0.5, GLOROT * [1, 1, *[math.log(16) ** 0.5] * 4, 1]),
}
WEIGHTS = ["attention.w_q", "attention.w_k", "attention.w_v", "attention.w_o", "ffn.w_up", "ffn.w_down"]


@pytest.mark.parametrize("scheme", INITS)
def test_weights_start_with_the_deviation_of_their_scheme(scheme):
    init, placement, embedding, expected = INITS[scheme]
    block = {
        "placement": placement,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        "ffn": {"mlp": F},
    }
    cfg = DecoderConfig.model_validate({"vocab": 256, "embed": D, "num_layers": L, "init": init, "block": block})
    params = create(cfg, jax.random.key(0))
    names = ["embedding", *(f"blocks.0.{n}" for n in WEIGHTS), "head", "blocks.0.ffn.w_gate"]
    for name, std in zip(names, [embedding, *expected, expected[4]], strict=True):
        assert np.std(params[name]) == pytest.approx(std, rel=0.03), name
        assert abs(np.mean(params[name])) < 0.03 * std, name
        assert np.abs(params[name]).max() <= 2.0001 * std / 0.8796, name


def test_bfloat16_weights_keep_the_stream_in_bfloat16_and_the_logits_in_float32():
    for name in DECODERS:
        params, _ = running(name)
        graphdef = abstract(DECODERS[name])[0]
        low = {n: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for n, x in params.items()}
        positions, documents, prefix = row([5, 6])
        x = jax.ShapeDtypeStruct((1, T, 16), jnp.bfloat16)

        def both(p, x, graphdef=graphdef, row=(positions, documents, prefix)):
            model = merge(graphdef, p)
            return model.layers(x, tokens_of(*row))[0], model.hidden(*plain_batch()), model(*plain_batch())

        stream, hidden, logits = jax.eval_shape(both, low, x)
        assert (stream.dtype, hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32), name


def test_bfloat16_logits_are_near_the_float32_ones():
    graphdef, params = small()
    exact = merge(graphdef, params)(*plain_batch())
    low = merge(graphdef, {n: x.astype(jnp.bfloat16) for n, x in params.items()})(*plain_batch())
    assert np.abs(low - exact).max() < 0.05 * np.abs(exact).max()


def test_attention_is_its_formula():
    """Equation 1 of Vaswani et al. in numpy and float64, with grouped heads, bias, soft-cap and mask."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 5, 4, 8)), rng.normal(size=(2, 7, 2, 8)), rng.normal(size=(2, 7, 2, 8))
    bias, visible = rng.normal(size=(1, 4, 5, 7)), rng.random((2, 5, 7)) < 0.5
    visible[..., 0] = True
    f32 = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    y = attend(*f32, jnp.asarray(visible), scale=0.3, bias=jnp.asarray(bias, jnp.float32), softcap=2.0)
    k, v = np.repeat(k, 2, 2), np.repeat(v, 2, 2)
    logits = np.einsum("btnh,bsnh->bnts", q, k) * 0.3
    logits = np.where(visible[:, None], 2 * np.tanh(logits / 2) + bias, -np.inf)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(y, np.einsum("bnts,bsnh->btnh", probs, v), atol=1e-5)


def test_attention_survives_huge_logits():
    q = 1e4 * jnp.ones((1, 2, 1, 4))
    y = jax.grad(lambda q: attend(q, q, q, jnp.ones((1, 2, 2), bool), scale=1.0).sum())(q)
    assert np.isfinite(y).all()


DROPOUT = decoder(dropout={"embedding": 0.1, "attention": 0.2, "residual": 0.3})


@functools.cache
def dropping():
    graphdef, params = abstract(DROPOUT)[0], create(DROPOUT, jax.random.key(0))
    return jax.jit(lambda key: merge(graphdef, params)(*plain_batch(), key=key))


def test_dropout_is_off_without_a_key():
    same = decoder()
    params = create(same, jax.random.key(0))
    a, b = (merge(abstract(cfg)[0], params)(*plain_batch()) for cfg in (DROPOUT, same))
    assert np.array_equal(a, b)


def test_dropout_is_a_function_of_its_key():
    first, again, other = (dropping()(jax.random.key(s)) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_drops_its_rate(rate):
    y = drop(jnp.ones(40_000), rate, jax.random.key(0))
    assert y.mean() == pytest.approx(1, abs=5 * (rate / (1 - rate) / 40_000) ** 0.5)
    assert (y == 0).mean() == pytest.approx(rate, abs=5 * (rate * (1 - rate) / 40_000) ** 0.5)


def test_dropout_of_attention_keeps_the_mean():
    q = jax.random.normal(jax.random.key(0), (1, 4, 1, 8))
    visible = jnp.ones((1, 4, 4), bool)
    keys = jax.random.split(jax.random.key(1), 2000)
    y = jax.vmap(lambda key: attend(q, q, jnp.ones_like(q), visible, scale=1.0, dropout=0.3, key=key))(keys)
    assert np.abs(y.mean(0) - 1).max() < 0.08


def test_every_layer_drops_elsewhere():
    """Two layers that add exactly 1 each: with one key for both, each element would be 0 or 4."""
    cfg = decoder(None, {"ffn": {"mlp": 4, "bias": True}}, dropout={"residual": 0.5}, final_norm=False)
    graphdef, params = abstract(cfg)[0], create(cfg, jax.random.key(0))
    params = {n: jnp.zeros_like(x) for n, x in params.items()} | {"blocks.0.ffn.b_down": jnp.ones((2, 16))}
    x = merge(graphdef, params).hidden(*plain_batch(), key=jax.random.key(0))
    values, counts = np.unique(x, return_counts=True)
    assert values.tolist() == [0, 2, 4]
    np.testing.assert_allclose(counts / counts.sum(), [0.25, 0.5, 0.25], atol=0.12)


def test_the_gradient_of_a_frequent_token_does_not_stall_in_bfloat16():
    ids_BT = jnp.full((16, 256), 3)
    table_VD = jnp.zeros((8, 4), jnp.bfloat16)
    grad_VD = jax.grad(lambda t: lookup(t, ids_BT).sum(dtype=jnp.float32))(table_VD)
    assert grad_VD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad_VD[3].astype(jnp.float32), 16 * 256)  # summed in bfloat16: 256
    assert not grad_VD[:3].any()


def test_ids_beyond_a_table_read_its_last_row():
    table_VD = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(lookup(table_VD, jnp.array([[0, 9]])), [[[0.0, 1.0], [4.0, 5.0]]])

"""Vectors of texts: pooled as told, alone as in a batch, cut where they are too long."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.data.config import ByteTokenizer
from jaxllm.data.tokenizers import build
from jaxllm.inference.embed import embed
from jaxllm.models.config import DecoderConfig, EncoderConfig, EncoderDecoderConfig
from jaxllm.models.module import abstract, create, merge

CONTEXT, CLS, SEP = 40, 257, 258
WORDS = build(ByteTokenizer())
SIZES = {"vocab": WORDS.vocab_size, "context": CONTEXT, "embed": 16, "num_layers": 2}
BLOCK = {"attention": {"num_heads": 2}, "ffn": {"mlp": 24}}
POST = BLOCK | {"norm": "layernorm", "placement": "post"}
DISENTANGLED = {"kind": "disentangled", "span": 8, "content_to_position": True, "position_to_content": True}
MODELS = {
    "bert": EncoderConfig.model_validate(
        SIZES | {"block": POST, "position": "learned", "segments": 2, "embedding_norm": "layernorm", "final_norm": False}
    ),
    "deberta": EncoderConfig.model_validate(SIZES | {
        "block": POST, "position": "none", "relative": DISENTANGLED, "convolution": {"width": 3}, "final_norm": False,
    }),
    "decoder": DecoderConfig.model_validate(SIZES | {"block": BLOCK, "position": "alibi"}),
}  # fmt: skip
TEXTS = ["a", "five!", "x" * 14, "y" * 20, "näheres folgt, sobald es da ist"]


@functools.cache
def made(name):
    """Random weights, those of norms and biases too."""
    graphdef, shapes, _ = abstract(MODELS[name])
    rng = np.random.default_rng(0)
    noise = {
        n: rng.normal(size=x.shape) * (x.shape[-1] ** -0.5 if len(x.shape) > 1 else 0.3) for n, x in shapes.items()
    }
    return merge(graphdef, {n: jnp.asarray(x + n.endswith("scale"), jnp.float32) for n, x in noise.items()})


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return made(request.param)


def pooled(model, ids, pool):
    """The vector of one row that has no padding."""
    T = jnp.arange(len(ids))[None]
    x_TD = np.asarray(model.hidden(jnp.asarray([ids]), T, jnp.ones_like(T)))[0]
    return {"mean": x_TD.mean(0), "cls": x_TD[0], "last": x_TD[-1]}[pool]


def around(text):
    return [CLS, *WORDS.encode(text), SEP]


@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_a_vector_is_pooled_over_the_tokens_of_its_text_and_no_padding(model, pool):
    if model.cfg.kind == "decoder" and pool == "cls":
        with pytest.raises(ConfigError, match="pool=cls: the first token of a decoder sees nothing"):
            embed(model, WORDS, TEXTS, pool=pool)
        return
    got = embed(model, WORDS, TEXTS, start=[CLS], end=[SEP], pool=pool, normalise=False, batch=3)
    assert got.dtype == np.float32 and got.shape == (len(TEXTS), 16)
    wanted = [pooled(model, around(text), pool) for text in TEXTS]
    np.testing.assert_allclose(got, wanted, atol=2e-5)


@settings(max_examples=10)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=6), st.integers(1, 3))
def test_no_text_changes_the_vector_of_another(texts, batch):
    model = made("bert")
    together = embed(model, WORDS, texts, start=[CLS], batch=batch)
    alone = [embed(model, WORDS, [text], start=[CLS])[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_a_long_text_is_cut_and_its_end_token_kept(model):
    told = []
    long, edge = "z" * (CONTEXT - 1), "z" * (CONTEXT - 2)  # the second fits, with what stands around it
    got = embed(model, WORDS, [long, "short", edge], start=[CLS], end=[SEP], normalise=False, cut=told.append)
    assert told == [[0]]
    np.testing.assert_allclose(got[0], got[2], atol=1e-6)
    np.testing.assert_allclose(got[2], pooled(model, around(edge), "mean"), atol=2e-5)
    (shorter,) = embed(model, WORDS, [long], start=[CLS], end=[SEP], normalise=False, max_tokens=5, cut=told.append)
    np.testing.assert_allclose(shorter, pooled(model, around("zzz"), "mean"), atol=2e-5)
    assert told == [[0], [0]]


def test_what_has_no_vector_is_refused():
    model = made("bert")
    with pytest.raises(ConfigError, match="no texts"):
        embed(model, WORDS, [])
    with pytest.raises(ConfigError, match="text 1 has no tokens"):
        embed(model, WORDS, ["a", ""], start=[CLS], end=[SEP])
    with pytest.raises(ConfigError, match="token id 1000, the model's vocabulary is 0 to 258"):
        embed(model, WORDS, ["a"], start=[1000])
    for wrong in (2, CONTEXT + 1):
        with pytest.raises(ConfigError, match=f"max_tokens={wrong}: .* give 3 to {CONTEXT}"):
            embed(model, WORDS, ["a"], start=[CLS], end=[SEP], max_tokens=wrong)
    both = EncoderDecoderConfig.model_validate({
        "encoder": SIZES | {"block": BLOCK}, "decoder": SIZES | {"block": BLOCK | {"cross": {"num_heads": 2}}},
    })  # fmt: skip
    graphdef, shapes, _ = abstract(both)
    with pytest.raises(ConfigError, match="model.kind=encoder_decoder has no vectors"):
        embed(merge(graphdef, shapes), WORDS, ["a"])


def test_damaged_weights_are_noticed():
    cfg = MODELS["bert"]
    params = create(cfg, jax.random.key(0))
    params["embedding"] = params["embedding"].at[97].set(jnp.nan)
    with pytest.raises(CheckpointError, match="NaN"):
        embed(merge(abstract(cfg)[0], params), WORDS, ["a"])


def test_bfloat16_weights_give_nearly_the_same_vectors_in_float32():
    cfg = MODELS["bert"]
    graphdef, params = abstract(cfg)[0], create(cfg, jax.random.key(0))
    half = merge(graphdef, {name: x.astype(jnp.bfloat16) for name, x in params.items()})
    got = embed(half, WORDS, TEXTS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, embed(merge(graphdef, params), WORDS, TEXTS), atol=0.05)

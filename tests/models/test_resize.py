import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.models.config import DecoderConfig
from jaxllm.models.module import abstract, create, merge
from jaxllm.models.resize import resize_vocabulary

OLD, NEW = 11, 17
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, OLD)
POSITIONS = jnp.broadcast_to(jnp.arange(6), (2, 6))


def made(**choices) -> tuple[dict, DecoderConfig]:
    tree = {
        "vocab": OLD,
        "context": 8,
        "embed": 16,
        "num_layers": 1,
        "block": {"attention": {"num_heads": 2}, "ffn": {"mlp": 8}},
    }
    cfg = DecoderConfig.model_validate(tree | choices)
    params = create(cfg, jax.random.key(0))
    if cfg.head_bias:
        params["head_bias"] = jax.random.normal(jax.random.key(2), (OLD,))
    return params, cfg


def logits(params: dict, cfg: DecoderConfig) -> jax.Array:
    return merge(abstract(cfg)[0], params)(TOKENS, POSITIONS, jnp.ones_like(TOKENS))


CHOICES = [{}, {"tie": True}, {"head_bias": True}, {"tie": True, "head_bias": True}]


@pytest.mark.parametrize("choices", CHOICES)
def test_old_tokens_keep_their_weights_to_the_bit_and_their_logits(choices):
    params, cfg = made(**choices)
    larger, larger_cfg = resize_vocabulary(params, cfg, NEW)
    assert larger_cfg == cfg.model_copy(update={"vocab": NEW})
    assert {n: x.shape for n, x in larger.items()} == {n: x.shape for n, x in abstract(larger_cfg)[1].items()}
    for name, old in params.items():
        assert np.array_equal(larger[name][tuple(slice(n) for n in old.shape)], old), name
    np.testing.assert_allclose(logits(larger, larger_cfg)[..., :OLD], logits(params, cfg), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("choices", CHOICES)
def test_new_tokens_are_the_mean_of_the_old_and_at_most_that_likely(choices):
    params, cfg = made(**choices)
    larger, larger_cfg = resize_vocabulary(params, cfg, NEW)
    np.testing.assert_allclose(
        larger["embedding"][OLD:], np.tile(params["embedding"].mean(0), (NEW - OLD, 1)), atol=1e-6
    )
    new, old = logits(larger, larger_cfg)[..., OLD:], logits(params, cfg)
    np.testing.assert_allclose(new, np.broadcast_to(old.mean(-1, keepdims=True), new.shape), atol=1e-5)
    # Jensen: exp of the mean logit is at most the mean of the exps.
    assert (new <= jax.nn.logsumexp(old, -1, keepdims=True) - np.log(OLD) + 1e-5).all()


def test_the_mean_of_many_bfloat16_rows_is_not_lost_to_rounding():
    params, cfg = made(vocab=4096)
    params = {n: (x + 1).astype(jnp.bfloat16) for n, x in params.items()}
    larger, _ = resize_vocabulary(params, cfg, 4097)
    assert larger["embedding"].dtype == jnp.bfloat16
    expected = np.asarray(params["embedding"], np.float64).mean(0)
    np.testing.assert_allclose(np.asarray(larger["embedding"][-1], np.float64), expected, rtol=2**-8, atol=1e-3)


def test_the_same_size_changes_nothing():
    params, cfg = made()
    same, same_cfg = resize_vocabulary(params, cfg, OLD)
    assert same_cfg == cfg and all(same[n] is params[n] for n in params)


def test_shrinking_is_refused():
    params, cfg = made()
    with pytest.raises(ConfigError, match="model.vocab=10 is fewer than the 11"):
        resize_vocabulary(params, cfg, 10)

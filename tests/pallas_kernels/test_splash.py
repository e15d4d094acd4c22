"""The TPU kernel for training, interpreted on CPU, beside the reference softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import config
from jaxllm.models.layers.attention import Mixing, Tokens
from pallas_kernels.attention import splash

B, T, N, K, H = 2, 256, 4, 2, 64


def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(keys[i], (B, T, n, H)) for i, n in enumerate((N, K, K)))
    documents = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (B, T), dtype=np.int32), 1)[:, ::-1])
    return (q, k, v), documents, jax.random.normal(keys[3], (B, T, N, H))


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention",
    [{}, {"window": 60, "softcap": 20.0}, {"mask": {"kind": "full"}}],
    ids=["causal", "window-softcap", "full"],
)
def test_the_kernel_and_its_gradients_are_those_of_the_reference(attention):
    mixing = Mixing(config.Attention(num_heads=N, num_kv_heads=K, **attention), H**-0.5, alibi=None)
    qkv, documents, cotangent = arrays()
    index = jnp.arange(T)[None]
    tokens = Tokens(index, index, documents, jnp.zeros((1, 1), bool))

    def kernel(q, k, v):
        return splash.attention(
            q, k, v, documents, causal=mixing.causal, window=mixing.cfg.window, scale=mixing.scale,
            softcap=mixing.cfg.softcap, interpret=True,
        )  # fmt: skip

    def reference(q, k, v):
        return mixing.whole(q, k, v, tokens, tokens, mixing.slopes())

    ours, pull = jax.vjp(kernel, *qkv)
    expected, pull_expected = jax.vjp(reference, *qkv)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)
    for mine, theirs in zip(pull(cotangent), pull_expected(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_shapes_that_the_kernel_cannot_cut_are_left_to_the_reference():
    def fits(t, h, s=None):
        return splash.applies(jnp.empty((1, t, 2, h)), jnp.empty((1, s or t, 2, h)))

    assert fits(256, 64) and fits(128, 128)
    assert not fits(200, 64) and not fits(256, 48) and not fits(128, 64, s=256)

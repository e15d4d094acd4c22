import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.models.config import LayerNorm, RMSNorm
from jaxllm.models.layers.norm import Norm

D = 16
CONFIGS = [RMSNorm(), RMSNorm(epsilon=0.1), RMSNorm(unit_offset=True), LayerNorm(), LayerNorm(bias=False, epsilon=1e-3)]


def made(cfg, seed: int = 0, **axes: int) -> Norm:
    """A norm with random weights."""
    rng = np.random.default_rng(seed)
    norm = Norm(cfg, **axes)
    norm.scale[...] = jnp.asarray(rng.normal(size=norm.scale.shape), jnp.float32)
    if hasattr(norm, "bias"):
        norm.bias[...] = jnp.asarray(rng.normal(size=norm.bias.shape), jnp.float32)
    return norm


def truth(norm: Norm, x: np.ndarray) -> np.ndarray:
    """The formula in float64 over the last dimension."""
    x, scale = x.astype(np.float64), np.asarray(norm.scale[...], np.float64)
    if norm.cfg.kind == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.cfg.epsilon) * (scale + norm.cfg.unit_offset)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.cfg.epsilon) * scale
    return y + np.asarray(norm.bias[...]) if norm.cfg.bias else y


@pytest.mark.parametrize("cfg", CONFIGS)
@given(st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from([0.0, 3.0]))
def test_norms_are_their_formula(cfg, seed, size, shift):
    x = size * np.random.default_rng(seed).normal(shift, 1, (3, D)).astype(np.float32)
    norm = made(cfg, seed, embed=D)
    np.testing.assert_allclose(norm(jnp.asarray(x)), truth(norm, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_norms_and_their_gradients_equal_those_of_torch(cfg):
    torch = pytest.importorskip("torch")
    norm = made(cfg, embed=D)
    x, up = np.random.default_rng(1).normal(size=(2, 5, D)).astype(np.float32)
    scale = torch.tensor(np.asarray(norm.scale[...])) + (cfg.kind == "rmsnorm" and cfg.unit_offset)
    leaf = torch.tensor(x, requires_grad=True)
    if cfg.kind == "rmsnorm":
        y = torch.nn.functional.rms_norm(leaf, (D,), scale, cfg.epsilon)
    else:
        bias = torch.tensor(np.asarray(norm.bias[...])) if cfg.bias else None
        y = torch.nn.functional.layer_norm(leaf, (D,), scale, bias, cfg.epsilon)
    y.backward(torch.tensor(up))
    ours, pull = jax.vjp(norm, jnp.asarray(x))
    np.testing.assert_allclose(ours, y.detach(), atol=1e-5)
    np.testing.assert_allclose(pull(jnp.asarray(up))[0], leaf.grad, atol=1e-5)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_a_fresh_norm_scales_to_one(cfg):
    x = 5 * jax.random.normal(jax.random.key(0), (4, 512))
    assert np.std(Norm(cfg, embed=512)(x)) == pytest.approx(1, abs=0.05)


def test_a_norm_of_two_axes_normalises_over_both():
    norm, flat = made(RMSNorm(), heads=4, head_dim=4), made(RMSNorm(), embed=D)
    x = jax.random.normal(jax.random.key(0), (3, D))
    np.testing.assert_allclose(norm(x.reshape(3, 4, 4)).reshape(3, D), flat(x), rtol=1e-6)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_a_bfloat16_norm_is_computed_in_float32(cfg):
    norm = made(cfg, embed=D)
    x = (100 + jax.random.normal(jax.random.key(0), (8, D))).astype(jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), truth(norm, np.asarray(x, np.float32)), rtol=2**-8, atol=2**-8)

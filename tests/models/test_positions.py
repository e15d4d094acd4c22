import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.models.positions import ALiBi, RoPE, Sinusoidal
from jaxllm.models.layers.position import alibi_slopes, rotate, rotation, sinusoids

H = 8
RNG = np.random.default_rng(0)
Q, K = RNG.normal(size=(2, H)).astype(np.float32)


def rotated(cfg: RoPE, x: np.ndarray, position: int) -> np.ndarray:
    rotary_dim = round(x.shape[-1] * cfg.fraction)
    at = jnp.full((1, 1), position, jnp.int32)
    return np.asarray(rotate(cfg, jnp.asarray(x)[None, None, None], rotation(cfg, at, None, rotary_dim))[0, 0, 0])


@pytest.mark.parametrize("cfg", [RoPE(), RoPE(interleaved=True), RoPE(fraction=0.5, theta=100.0)])
@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 300))
def test_rotated_dot_products_depend_on_the_distance_only(cfg, i, j, shift):
    here = rotated(cfg, Q, i) @ rotated(cfg, K, j)
    there = rotated(cfg, Q, i + shift) @ rotated(cfg, K, j + shift)
    np.testing.assert_allclose(here, there, atol=2e-4)


@pytest.mark.parametrize("position", [0, 1, 77])
def test_rotation_multiplies_complex_pairs_by_the_papers_angles(position):
    """Equation 15 of the paper, in complex numbers and float64."""
    angles = position * 10_000.0 ** (-2 * np.arange(H // 2) / H)
    pairs = (Q[::2] + 1j * Q[1::2]) * np.exp(1j * angles)
    expected = np.stack([pairs.real, pairs.imag], -1).reshape(H)
    np.testing.assert_allclose(rotated(RoPE(interleaved=True), Q, position), expected, atol=1e-5)


@given(st.integers(0, 500))
def test_interleaved_rotation_is_that_of_halves_with_dimensions_permuted(position):
    halves = np.concatenate([np.arange(0, H, 2), np.arange(1, H, 2)])
    np.testing.assert_allclose(
        rotated(RoPE(interleaved=True), Q, position)[halves], rotated(RoPE(), Q[halves], position), rtol=1e-6
    )


def test_a_fraction_leaves_the_rest_of_the_head_alone_to_the_bit():
    y = rotated(RoPE(fraction=0.5), Q, 9)
    assert np.array_equal(y[4:], Q[4:])
    np.testing.assert_array_equal(y[:4], rotated(RoPE(), Q[:4], 9))


def test_rotation_keeps_the_type_of_its_input():
    x = jnp.ones((1, 1, 1, H), jnp.bfloat16)
    assert rotate(RoPE(), x, rotation(RoPE(), jnp.ones((1, 1), jnp.int32), None, H)).dtype == jnp.bfloat16


def test_alibi_slopes_are_those_of_the_paper():
    """8 heads: 1/2, 1/4, ... 1/256 (section 3); 12: those of 8, then every other of 16."""
    np.testing.assert_allclose(alibi_slopes(ALiBi(), 8), [2.0**-i for i in range(1, 9)], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(ALiBi(), 16)[:3], [2**-0.5, 2**-1.0, 2**-1.5], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(ALiBi(), 12)[:8], alibi_slopes(ALiBi(), 8), rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(ALiBi(), 12)[8:], [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(ALiBi(), 1), [2.0**-8], rtol=1e-6)


@pytest.mark.parametrize("embed", [6, 7])
def test_sinusoids_are_the_papers_formula(embed):
    """Section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos of the same."""
    table = sinusoids(Sinusoidal(), jnp.array([[0, 1, 50]], jnp.int32), embed)[0]
    for row, position in zip(table, (0, 1, 50), strict=True):
        angles = [position / 10_000 ** (2 * (d // 2) / embed) for d in range(embed)]
        np.testing.assert_allclose(row, [np.cos(a) if d % 2 else np.sin(a) for d, a in enumerate(angles)], atol=1e-5)


def test_positions_of_far_tokens_are_exact_to_float32():
    """At 131071 the fastest pair has turned 20860 times: an angle computed in less than float32 would be noise."""
    np.testing.assert_allclose(
        rotation(RoPE(), jnp.array([[131_071]], jnp.int32), None, H).sin_BTR[0, 0, 0], np.sin(131_071), atol=1e-4
    )

"""Scaled rotations, read from a config.json, against the angles that transformers computes of the same file."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxllm.interop.folder import BY_KIND
from jaxllm.models.layers.position import document_lengths, rotation

SCALINGS = {
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("length", [40, 200])
def test_scaled_rotations_are_those_of_transformers(kind, length):
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **SCALINGS[kind]}
    theirs = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, rope_parameters=rope
    )
    freq_R, temperature = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=length)
    angles = np.arange(length)[:, None] * freq_R.double().numpy()
    cfg = BY_KIND["llama"].ours(theirs.to_dict())
    positions = jnp.arange(length)[None]
    got = rotation(cfg.position, positions, document_lengths(positions, jnp.ones_like(positions)), 16)
    np.testing.assert_allclose(got.cos_BTR[0], temperature * np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(got.sin_BTR[0], temperature * np.sin(angles), atol=1e-4)

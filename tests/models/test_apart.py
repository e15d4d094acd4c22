"""A model whose layers lie apart computes what the same model with stacked layers does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.config import DecoderConfig
from jaxllm.models.layers.linear import _in_order
from jaxllm.models.module import for_decoding, split

PATTERNS = {
    "alike": {"num_layers": 3},
    "local and global, one left over": {
        "num_layers": 5, "pattern": [{"attention": {"window": 4, "num_heads": 2}}, {"attention": {"num_heads": 2}}],
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_layers_apart_compute_and_decode_as_stacked_ones(name):
    cfg = DecoderConfig.model_validate(
        {"vocab": 37, "embed": 16, "context": 32, "position": {"kind": "rope"},
         "block": {"attention": {"num_heads": 2}, "ffn": {"mlp": 24}}} | PATTERNS[name]
    )  # fmt: skip
    model = cfg.build()
    apart = for_decoding(model)
    assert split(model)[1].keys() != split(apart)[1].keys() and not apart.blocks and len(apart.tail) == cfg.num_layers
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(37, size=(2, 9)), jnp.int32)
    place = jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones((2, 9), jnp.int32)
    np.testing.assert_allclose(apart(tokens_BT, *place), model(tokens_BT, *place), atol=1e-5)
    pad_B, states = jnp.array([0, 2]), []
    for m in (model, apart):
        logits_BV, cache = m.prefill(tokens_BT[:, :5], pad_B, capacity=12)
        said = [logits_BV]
        for t in range(5, 9):
            logits_BV, cache = m.decode(tokens_BT[:, t], cache)
            said.append(logits_BV)
        states.append(jnp.stack(said))
    np.testing.assert_allclose(states[1], states[0], atol=1e-5)


def test_a_model_that_lies_apart_stays_as_it_is():
    cfg = DecoderConfig.model_validate(
        {"vocab": 7, "embed": 8, "num_layers": 2, "block": {"attention": {"num_heads": 2}}}
    )
    apart = for_decoding(cfg.build())
    assert for_decoding(apart) is apart


def test_contractions_take_weights_as_they_lie():
    assert _in_order("BTNH,NHD->BTD") == "abcd,cde->abe"
    x, w = jnp.ones((1, 1, 2, 4)), jnp.ones((2, 4, 8))
    program = jax.jit(lambda x, w: jnp.einsum(_in_order("BTNH,NHD->BTD"), x, w)).lower(x, w).as_text()
    assert "contracting_dims = [2, 3] x [0, 1]" in program

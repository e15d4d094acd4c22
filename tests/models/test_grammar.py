"""What single words of a model's config mean, each held against what it would be without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.inference.generate import generate
from jaxllm.models.config import DecoderConfig, EncoderConfig
from jaxllm.models.count import parameters
from jaxllm.models.layers.position import sinusoids
from jaxllm.models.module import abstract, create, merge, split
from jaxllm.models.positions import Sinusoidal

T, V = 10, 32


def decoder(attention: dict | None = None, block: dict | None = None, **top) -> DecoderConfig:
    block = {"ffn": {"mlp": 24}, **(block or {}), "attention": {"num_heads": 4, **(attention or {})}}
    return DecoderConfig.model_validate(
        {"vocab": V, "context": 16, "embed": 16, "num_layers": 2, **top, "block": block}
    )


def tokens(batch: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (batch, T), 0, V)


def logits(cfg: DecoderConfig, params: dict, ids_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(T), ids_BT.shape)
    return merge(abstract(cfg)[0], params)(ids_BT, positions_BT, jnp.ones_like(ids_BT))


@pytest.mark.parametrize("norm", ["rmsnorm", {"kind": "layernorm", "bias": False}])
def test_a_model_without_biases_has_not_one(norm):
    names = abstract(decoder(None, {"norm": norm}))[1]
    assert not [n for n in names if n.rpartition(".")[2].startswith(("b_", "bias"))]
    biased = decoder({"bias": True, "out_bias": True}, {"norm": "layernorm", "ffn": {"mlp": 24, "bias": True}})
    ours = {n.rpartition(".")[2] for n in abstract(biased)[1]} - {n.rpartition(".")[2] for n in names}
    assert ours == {"b_q", "b_k", "b_v", "b_o", "b_up", "b_gate", "b_down", "bias"}


def test_a_tied_embedding_is_one_array_whose_gradient_is_that_of_both_uses():
    tied, apart = decoder(tie=True, logit_scale=0.25), decoder(tie=False, logit_scale=0.25)
    params = create(tied, jax.random.key(0))
    assert abstract(apart)[1].keys() - params.keys() == {"head"}
    both = params | {"head": params["embedding"].T}
    np.testing.assert_allclose(logits(tied, params, tokens()), logits(apart, both, tokens()), atol=1e-6)
    loss = lambda cfg, p: jnp.square(logits(cfg, p, tokens())).sum()
    grad = jax.grad(functools.partial(loss, tied))(params)["embedding"]
    grads = jax.grad(functools.partial(loss, apart))(both)
    np.testing.assert_allclose(grad, grads["embedding"] + grads["head"].T, rtol=1e-4, atol=1e-4)


def test_layers_whose_branches_give_nothing_are_the_identity():
    cfg = decoder(final_norm=False)
    params = create(cfg, jax.random.key(0))
    params = {n: 0 * x if n.endswith(("w_o", "w_down")) else x for n, x in params.items()}
    wanted = params["embedding"][tokens()] @ params["head"]
    np.testing.assert_allclose(logits(cfg, params, tokens()), wanted, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_queries_are_all_heads_with_keys_and_values_repeated(groups):
    few, all_heads = decoder({"num_kv_heads": groups}), decoder()
    params = create(few, jax.random.key(0))
    tile = lambda x: jnp.repeat(x, 4 // groups, axis=2)  # [layers, embed, kv_heads, head_dim]
    tiled = {n: tile(x) if n.endswith(("w_k", "w_v")) else x for n, x in params.items()}
    np.testing.assert_allclose(logits(few, params, tokens()), logits(all_heads, tiled, tokens()), atol=1e-5)
    size = lambda cfg, p: sum(x.nbytes for x in jax.tree.leaves(_cache(cfg, p).blocks))
    assert size(few, params) * 4 == size(all_heads, tiled) * groups


def _cache(cfg: DecoderConfig, params: dict):
    return merge(abstract(cfg)[0], params).prefill(tokens(), jnp.zeros(2, jnp.int32), capacity=16)[1]


def test_heads_are_computed_as_a_loop_over_them_would():
    cfg = decoder(None, {"placement": "pre"}, num_layers=1, position="none", final_norm=False)
    params = {n: x[0] if n.startswith("blocks") else x for n, x in create(cfg, jax.random.key(0)).items()}
    w = {n.rpartition(".")[2]: np.asarray(x, np.float64) for n, x in params.items() if ".attention." in n}
    x = np.asarray(params["embedding"], np.float64)[np.asarray(tokens())]
    h = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    causal = np.tril(np.ones((T, T), bool))
    for head in range(4):
        q, k, v = (h @ w[n][:, head] for n in ("w_q", "w_k", "w_v"))
        scores = np.where(causal, q @ k.swapaxes(1, 2) * 4**-0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        x = x + weights / weights.sum(-1, keepdims=True) @ v @ w["w_o"][head]
    whole = create(cfg, jax.random.key(0))
    whole = {n: 0 * p if n.endswith("w_down") else p for n, p in whole.items()}
    np.testing.assert_allclose(logits(cfg, whole, tokens()), x @ np.asarray(params["head"]), atol=1e-6)


def test_layers_that_are_repeated_have_the_weights_of_one():
    """Lan et al. 2019, arXiv:1909.11942, section 3.1."""
    sizes = {"vocab": V, "context": 16, "embed": 16, "num_layers": 1, "block": {"attention": {"num_heads": 4}}}
    one, twelve = (EncoderConfig.model_validate(sizes | {"repeat": n}) for n in (1, 12))
    shapes = lambda cfg: {n: x.shape for n, x in abstract(cfg)[1].items()}
    assert shapes(one) == shapes(twelve) and parameters(one) == parameters(twelve)


def test_without_positions_and_causal_mask_the_order_of_tokens_is_not_seen():
    order = jax.random.permutation(jax.random.key(2), T)
    ids = tokens()
    for mask, seen in (("full", False), ("causal", True)):
        cfg = decoder({"mask": mask}, position="none")
        params = create(cfg, jax.random.key(0))
        moved, there = logits(cfg, params, ids[:, order]), logits(cfg, params, ids)[:, order]
        assert (float(jnp.abs(moved - there).max()) > 1e-2) == seen


def test_sinusoids_further_on_are_the_same_ones_turned():
    """PE(pos + k) is a fixed rotation of PE(pos) (Vaswani et al. 2017, section 3.5)."""
    table = np.asarray(sinusoids(Sinusoidal(), jnp.arange(60)[None], 16)[0], np.float64)
    pairs = table[:, ::2] + 1j * table[:, 1::2]
    turned = pairs[7:] / pairs[:-7]
    np.testing.assert_allclose(turned, np.broadcast_to(turned[:1], turned.shape), atol=1e-4)
    np.testing.assert_allclose(np.abs(turned), 1.0, atol=1e-4)


def test_a_prefix_is_seen_whole_and_what_follows_it_is_not_seen_from_it():
    """Liu et al. 2018; Raffel et al. 2019, arXiv:1910.10683, section 3.2.1."""
    cfg = decoder({"mask": {"kind": "some", "of": ["causal", "prefix"]}})
    params, causal = create(cfg, jax.random.key(0)), decoder()
    model, ids = merge(abstract(cfg)[0], params), tokens(1)
    positions, ones = jnp.arange(T)[None], jnp.ones((1, T), jnp.int32)
    run = lambda ids, prefix: np.asarray(model(ids, positions, ones, prefix_BT=jnp.arange(T)[None] < prefix))[0]
    changed = lambda at: ids.at[0, at].set((ids[0, at] + 1) % V)
    before = run(ids, 5)
    assert np.abs(run(changed(4), 5) - before)[:4].max() > 1e-3  # later in the prefix
    assert np.abs(run(changed(7), 5) - before)[:5].max() == 0  # after it
    np.testing.assert_array_equal(run(ids, 0), np.asarray(logits(causal, params, ids))[0])


def test_a_row_longer_than_the_learned_positions_is_refused():
    model = decoder(position="learned").build()
    with pytest.raises(ConfigError, match="context of 16"):
        generate(model, [[1] * 10], max_new_tokens=7)
    ids = jnp.ones((1, 17), jnp.int32)
    with pytest.raises(ConfigError, match="rows of 17 tokens for a model of 16 learned positions"):
        model(ids, jnp.arange(17)[None], ids)
    assert "positions" in split(model)[1]

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.config import DecoderConfig
from jaxllm.objectives.config import NextToken
from jaxllm.objectives.next_token import next_token

V = 13


def batch(rows: int = 3, length: int = 7, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.integers(0, V, (rows, length)))
    return {
        "tokens": ids, "targets": jnp.roll(ids, -1, 1), "positions": ids, "documents": jnp.ones_like(ids),
        "weights": jnp.asarray(rng.choice([0.0, 0.5, 1.0], (rows, length)), jnp.float32),
    }  # fmt: skip


def model_of(logits):
    return lambda *args, **kwargs: logits


def logits_like(data: dict, scale: float = 3.0):
    return scale * jax.random.normal(jax.random.key(0), (*data["tokens"].shape, V))


def test_a_batch_says_where_tokens_stand_in_the_spans_they_fill():
    cfg = DecoderConfig.model_validate({
        "vocab": V, "context": 8, "embed": 8, "num_layers": 1, "position": "rope_2d",
        "block": {"attention": {"num_heads": 2}, "ffn": {"mlp": 8}},
    })  # fmt: skip
    model, data = cfg.build(), batch()
    spans = data | {"positions": jnp.minimum(jnp.arange(7), 3) + 0 * data["tokens"]}
    spans["block"] = jnp.maximum(jnp.arange(7) - 3, 0) + 0 * data["tokens"]
    logits = model(spans["tokens"], spans["positions"], spans["documents"], block_BT=spans["block"])
    total = next_token(NextToken(), model, spans).total
    assert total == pytest.approx(next_token(NextToken(), model_of(logits), spans).total)
    assert abs(total - next_token(NextToken(), model, spans | {"block": None}).total) > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_equals_torch_with_and_without_label_smoothing(smoothing):
    torch = pytest.importorskip("torch")
    data = batch()
    logits = logits_like(data)
    loss = next_token(NextToken(label_smoothing=smoothing), model_of(logits), data)
    each = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(logits)).reshape(-1, V),
        torch.tensor(np.asarray(data["targets"], np.int64)).reshape(-1),
        label_smoothing=smoothing, reduction="none",
    )  # fmt: skip
    expected = (each * torch.tensor(np.asarray(data["weights"])).reshape(-1)).sum()
    np.testing.assert_allclose(loss.total, float(expected), rtol=1e-5)
    np.testing.assert_allclose(loss.weight, data["weights"].sum(), rtol=1e-6)


def test_z_loss_adds_the_square_of_log_z():
    data = batch()
    logits = logits_like(data)
    plain, with_z = (next_token(NextToken(z_loss=z), model_of(logits), data) for z in (0.0, 1e-2))
    log_z = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
    np.testing.assert_allclose(with_z.total - plain.total, 1e-2 * (data["weights"] * log_z**2).sum(), rtol=1e-4)
    np.testing.assert_allclose(with_z.metrics["xent"][0], plain.metrics["xent"][0])


def test_z_loss_pulls_log_z_towards_zero():
    data = batch()
    logits = logits_like(data) + 5.0
    slope = jax.grad(lambda shift: next_token(NextToken(z_loss=1.0), model_of(logits + shift), data).total)(0.0)
    assert slope > 0  # cross-entropy does not change with a shift: the whole slope is of the z-loss


def test_targets_of_weight_zero_change_nothing():
    data = batch()
    logits = logits_like(data)
    other = data | {"targets": jnp.where(data["weights"] == 0, (data["targets"] + 1) % V, data["targets"])}
    np.testing.assert_array_equal(
        next_token(NextToken(), model_of(logits), data).total, next_token(NextToken(), model_of(logits), other).total
    )


def test_accuracy_counts_the_weight_of_targets_with_the_largest_logit():
    data = batch()
    right = jax.nn.one_hot(data["targets"], V) * 10
    hits, weight = next_token(NextToken(), model_of(right), data).metrics["accuracy"]
    assert hits == weight
    wrong = jax.nn.one_hot((data["targets"] + 1) % V, V) * 10
    assert next_token(NextToken(), model_of(wrong), data).metrics["accuracy"][0] == 0


def test_large_logits_do_not_overflow():
    data = batch()
    loss = next_token(NextToken(), model_of(logits_like(data, 1e4)), data)
    assert jnp.isfinite(loss.total)


def test_the_gradient_is_softmax_minus_target():
    data = batch()
    logits = logits_like(data)
    grad = jax.grad(lambda x: next_token(NextToken(), model_of(x), data).total)(logits)
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(data["targets"], V)) * data["weights"][..., None]
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_a_model_that_knows_nothing_loses_the_log_of_the_vocabulary():
    data = batch()
    loss = next_token(NextToken(), model_of(jnp.zeros((*data["tokens"].shape, V))), data)
    np.testing.assert_allclose(loss.total / loss.weight, np.log(V), rtol=1e-6)

"""What distance adds to logits: each kind against its paper's formula, and the properties that all must have."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.models.config import DecoderConfig
from jaxllm.models.layers.attention import Attention, attend
from jaxllm.models.layers.relative import make
from jaxllm.models.module import abstract, create, merge
from jaxllm.models.stack import row_tokens
from tests.marks import slow_but

N, H, D, T, V = 3, 4, 12, 9, 30
KINDS = {
    "t5": {"kind": "t5", "buckets": 8, "max_distance": 20},
    "t5_both_ways": {"kind": "t5", "buckets": 8, "max_distance": 20, "bidirectional": True, "shared": False},
    "kerple_log": {"kind": "kerple"},
    "kerple_power": {"kind": "kerple", "form": "power", "shared": True},
    "sandwich": {"kind": "sandwich", "size": 6},
    "fire": {"kind": "fire", "hidden": 5, "threshold": 3.0},
    "tisa": {"kind": "tisa", "kernels": 2},
    "shaw": {"kind": "shaw", "clip": 2},
    "xl": {"kind": "xl"},
    "xl_shared": {"kind": "xl", "shared_biases": True},
    "disentangled": {"kind": "disentangled", "span": 3},
    "disentangled_buckets": {"kind": "disentangled", "span": 9, "buckets": 4, "own_projections": False, "norm": True},
}


def config(relative: dict, **more) -> DecoderConfig:
    return DecoderConfig.model_validate({
        "vocab": V, "context": 64, "embed": D, "num_layers": 2, "position": "none", "relative": relative,
        "block": {"norm": "layernorm", "attention": {"num_heads": N, "head_dim": H, "bias": True}, "ffn": {"mlp": 10}},
        **more,
    })  # fmt: skip


def modules(cfg: DecoderConfig) -> tuple[Attention, object, object]:
    """An attention of random weights, what is its own of distance, and what all layers share."""
    rng = np.random.default_rng(0)
    attention = Attention(cfg, cfg.block, rngs=nnx.Rngs(0))
    whole = make(cfg, N, H, rngs=nnx.Rngs(1), layered=False)
    for module in (attention, whole):
        for path, p in nnx.to_flat_state(nnx.state(module, nnx.Param)) if module is not None else ():
            x = rng.normal(0, 0.7, p.get_value().shape)
            p.set_value(jnp.asarray(np.abs(x) + 0.1 if path[-1] in ("a", "b", "c", "threshold") else x, jnp.float32))
    return attention, attention.relative, whole


def arrays(module) -> dict[str, np.ndarray]:
    if module is None:
        return {}
    return {".".join(map(str, path)): np.asarray(p.get_value(), np.float64)
            for path, p in nnx.to_flat_state(nnx.state(module, nnx.Param))}  # fmt: skip


def sinusoid(distance: int) -> np.ndarray:
    angle = distance / 10_000 ** (np.arange(0, D, 2) / D)
    return np.concatenate([np.sin(angle), np.cos(angle)])


def bucket(cfg, distance: int) -> int:
    """Raffel et al. 2019, section 2.1, in words: exact, then logarithmic, then one for all."""
    count, first = cfg.buckets, 0
    if cfg.bidirectional:
        count //= 2
        first, distance = (count if distance < 0 else 0), abs(distance)
    distance = max(distance, 0)
    exact = count // 2
    if distance < exact:
        return first + distance
    far = math.log(distance / exact) / math.log(cfg.max_distance / exact) * (count - exact)
    return first + min(exact + int(far), count - 1)


def log_row(cfg, distance: int) -> int:
    if cfg.buckets is None:
        size, d = cfg.span, distance
    else:
        size, half = cfg.buckets, cfg.buckets // 2
        d = distance
        if abs(distance) > half:
            steps = math.log(abs(distance) / half) / math.log((cfg.span - 1) / half) * (half - 1)
            d = int(math.copysign(math.ceil(steps) + half, distance))
    return min(max(d + size, 0), 2 * size - 1)


def expected(cfg: DecoderConfig, attention, own, whole, q: np.ndarray, k: np.ndarray, n: int, i: int, j: int) -> float:
    """What is added to the logit of head n, of a query at i and a key at j."""
    r, d, w = cfg.relative, i - j, arrays(own) | arrays(whole)
    a = arrays(attention)
    match r.kind:
        case "t5":
            return w["table"][bucket(r, d), n]
        case "kerple":
            p1, p2 = w["a"][n], w["b"][n]
            return -p1 * math.log(1 + p2 * abs(d)) if r.form == "log" else -p1 * abs(d) ** min(p2, 2)
        case "sandwich":
            total = sum(math.cos(d / 10_000 ** (2 * m / r.size)) for m in range(1, r.size // 2 + 1))
            return 8 * (n + 1) / N * (total - r.size // 2)
        case "fire":
            psi = lambda x: math.log(abs(w["c"][0]) * x + 1)
            x = psi(abs(d)) / psi(max(i, abs(w["threshold"][0])))
            return np.maximum(x * w["w_in"] + w["b_in"], 0) @ w["w_out"][:, n] + w["b_out"][n]
        case "tisa":
            bumps = zip(w["height"][:, n], w["width"][:, n], w["centre"][:, n], strict=True)
            return sum(h * math.exp(-abs(b) * (j - i - c) ** 2) for h, b, c in bumps)
        case "shaw":
            return q[n] @ w["keys"][min(max(-d, -r.clip), r.clip) + r.clip] / math.sqrt(H)
        case "xl":
            placed = np.einsum("D,DH->H", sinusoid(d), w["w_r"][:, n])
            return (w["u"][n] @ k[n] + (q[n] + w["v"][n]) @ placed) / math.sqrt(H)
        case "disentangled":
            table = w["table"]
            if r.norm:
                table = (table - table.mean(-1, keepdims=True)) / np.sqrt(table.var(-1, keepdims=True) + 1e-5)
                table = table * w["norm.scale"] + w["norm.bias"]
            by = w if r.own_projections else a
            keys = table @ by["w_k"][:, n] + by["b_k"][n]
            queries = table @ by["w_q"][:, n] + by["b_q"][n]
            row = log_row(r, d)
            return (q[n] @ keys[row] + k[n] @ queries[row]) / math.sqrt(H)
    raise AssertionError(r.kind)


def tokens(length: int):
    at = jnp.arange(length)[None]
    return row_tokens(at, jnp.ones_like(at))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_added_is_what_the_paper_says(name):
    cfg = config(KINDS[name])
    attention, own, whole = modules(cfg)
    q, k = np.random.default_rng(1).normal(size=(2, 1, T, N, H)).astype(np.float32)
    got = (own or whole)(attention, jnp.asarray(q), jnp.asarray(k), tokens(T), tokens(T), whole)
    got = np.broadcast_to(np.asarray(got), (1, N, T, T))[0]
    wanted = [
        [[expected(cfg, attention, own, whole, q[0, i], k[0, j], n, i, j) for j in range(T)] for i in range(T)]
        for n in range(N)
    ]
    np.testing.assert_allclose(got, np.array(wanted), atol=2e-5, rtol=2e-5)


def test_vectors_of_distances_are_added_to_values_too():
    """Shaw et al. 2018, equation 3."""
    cfg = config(KINDS["shaw"])
    attention, own, _ = modules(cfg)
    q, k, v = np.random.default_rng(1).normal(size=(3, 1, T, N, H)).astype(np.float32)
    rows = np.clip(np.arange(T)[None] - np.arange(T)[:, None], -2, 2) + 2
    near = arrays(own)["of_values"][rows]  # [T, S, H]
    seen = np.tril(np.ones((T, T), bool))
    logits = np.where(seen[None], np.einsum("tnh,snh->nts", q[0], k[0]) / 2, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    wanted = np.einsum("nts,snh->tnh", p, v[0]) + np.einsum("nts,tsh->tnh", p, near)
    got = attend(*map(jnp.asarray, (q, k, v, seen[None])), scale=0.5, values_BTSH=own.values(tokens(T), tokens(T)))
    np.testing.assert_allclose(got[0], wanted, atol=1e-5)


MODELS = {name: config(relative) for name, relative in KINDS.items()} | {
    "xpos": config(None).model_copy(update={"position": DecoderConfig(position={"kind": "rope", "xpos": 8.0}).position}),
    "random": config(KINDS["t5"], random_positions=200),
    "random_rope": config(None, position="rope", random_positions=200),
    "rope_and_xl_of_fewer_keys": config(KINDS["xl"], position="rope", block={
        "norm": "layernorm", "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": H}, "ffn": {"mlp": 10},
    }),
}  # fmt: skip


def weights(cfg: DecoderConfig):
    params = create(cfg, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    noisy = {n: x + 0.3 * jax.random.normal(k, x.shape) for (n, x), k in zip(params.items(), keys, strict=True)}
    return abstract(cfg)[0], noisy


@pytest.mark.parametrize("name", slow_but(MODELS, "t5", "xl", "disentangled"))
def test_packed_is_alone_and_cached_decoding_the_full_forward_pass(name):
    graphdef, params = weights(MODELS[name])
    model = merge(graphdef, params)
    ids = jax.random.randint(jax.random.key(2), (2, T), 0, V)
    at, one = jnp.arange(T)[None].repeat(2, 0), jnp.ones((2, T), jnp.int32)
    forward = jax.jit(lambda p, *row: merge(graphdef, p)(*row))
    alone = forward(params, ids, at, one)
    packed = forward(
        params, ids.reshape(1, -1), at.reshape(1, -1), jnp.repeat(jnp.array([[1, 2]]), T, axis=1).astype(jnp.int32)
    )
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=2e-5)
    # row 0 begins at its fourth token, behind padding
    late = forward(params, ids[:1, 3:], at[:1, : T - 3], one[:1, 3:])
    logits, cache = model.prefill(ids[:, :6], jnp.array([3, 0]), capacity=T)
    for i in range(6, T):
        logits, cache = model.decode(ids[:, i], cache)
    np.testing.assert_allclose(logits[1], alone[1, -1], atol=2e-5)
    np.testing.assert_allclose(logits[0], late[0, -1], atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_all_that_is_learned_of_distance_gets_a_gradient(name):
    graphdef, params = weights(MODELS[name])
    ids = jax.random.randint(jax.random.key(2), (1, T), 0, V)
    at, one = jnp.arange(T)[None], jnp.ones((1, T), jnp.int32)
    grads = jax.jit(jax.grad(lambda p: jnp.square(merge(graphdef, p)(ids, at, one)).mean()))(params)
    assert all(np.isfinite(g).all() for g in grads.values())
    for n, g in grads.items():
        if "relative" in n:
            assert np.abs(g).max() > 0, n


def test_xpos_lets_products_decay_with_distance_as_the_paper_says():
    """Sun et al. 2022, equation 13: a factor of zeta^(distance) on each pair."""
    from jaxllm.models.layers.position import rotate, rotation
    from jaxllm.models.positions import RoPE

    cfg, plain = RoPE(xpos=8.0), RoPE()
    q, k = np.random.default_rng(0).normal(size=(2, H)).astype(np.float32)
    at = lambda cfg, x, i, keys: np.asarray(
        rotate(cfg, jnp.asarray(x)[None, None, None], rotation(cfg, jnp.full((1, 1), i), None, H), keys=keys)[0, 0, 0]
    )
    zeta = (np.arange(0, H, 2) / H + 0.4) / 1.4
    for i, j in ((3, 1), (20, 4), (5, 5)):
        by_pair = at(plain, q, i, False) * at(plain, k, j, True) * np.tile(zeta, 2) ** ((i - j) / 8.0)
        np.testing.assert_allclose(at(cfg, q, i, False) @ at(cfg, k, j, True), by_pair.sum(), rtol=1e-4)


def test_random_positions_are_sorted_drawn_anew_in_training_and_the_same_ones_elsewhere():
    from jaxllm.models.layers.position import spread

    at = jnp.arange(T)[None].repeat(3, 0)
    one, two = (np.asarray(spread(at, 16, 500, jax.random.key(i))) for i in (0, 1))
    assert (np.diff(one) > 0).all() and one.min() >= 0 and one.max() < 500
    assert (one != two).any() and (one[0] != one[1]).any()
    still = np.asarray(spread(at, 16, 500, None))
    assert (still == still[0]).all() and (still == np.asarray(spread(at, 16, 500, None))).all()
    # in expectation evenly spread over all positions
    many = np.asarray(spread(jnp.arange(16)[None].repeat(400, 0), 16, 500, jax.random.key(2)))
    np.testing.assert_allclose(many.mean(0), (np.arange(16) + 1) * 501 / 17 - 1, atol=12)

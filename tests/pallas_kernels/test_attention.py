"""Attention: the reference beside equation 1 in float64, and kernels beside the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax

from pallas_kernels.attention import api, masks, reference, tpu
from pallas_kernels.attention.api import attention
from pallas_kernels.attention.bias import Distances, Slopes, bucketed
from pallas_kernels.attention.masks import Causal, Dilated, Documents, Full, Global, Prefix, Sinks, Window
from tests.pallas_kernels.test_attention_masks import kinds


def drawn(seed: int, B: int, T: int, S: int, N: int, K: int, H: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def slow(q, k, v, mask, scale, softcap, slopes, shift):
    """One query after the other, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, N, _), (_, S, K, _) = q.shape, k.shape
    seen = np.broadcast_to(np.asarray(masks.dense(mask, T, S)), (B, T, S))
    o, lse = np.zeros(q.shape), np.full((B, N, T), -np.inf)
    for b, n, t in np.ndindex(B, N, T):
        keys = np.flatnonzero(seen[b, t])
        if not len(keys):
            continue
        logits = k[b, keys, n // (N // K)] @ q[b, t, n] * scale
        logits = softcap * np.tanh(logits / softcap) if softcap else logits
        logits = logits - (0 if slopes is None else slopes[n] * np.abs(t + shift - keys))
        o[b, t, n], lse[b, n, t] = softmax(logits) @ v[b, keys, n // (N // K)], logsumexp(logits)
    return o, lse


@given(
    st.data(), st.sampled_from([(1, 1, 1), (2, 7, 5), (1, 12, 12)]), st.sampled_from([(4, 2), (3, 1)]),
    st.none() | st.floats(1, 20), st.booleans(), st.integers(-5, 5),
)  # fmt: skip
@settings(max_examples=25, derandomize=True, deadline=None)
def test_the_reference_is_equation_1_in_float64(data, sizes, heads, softcap, sloped, shift):
    B, T, S = sizes
    mask = data.draw(kinds(B, T, S))
    q, k, v, _ = drawn(0, B, T, S, *heads, 8)
    slopes = np.linspace(0.1, 1, heads[0]) if sloped else None
    o, lse = reference.attention(
        q, k, v, mask, scale=0.4, softcap=softcap, slopes_N=None if slopes is None else jnp.asarray(slopes), shift=shift
    )
    expected, log = slow(q, k, v, mask, 0.4, softcap, slopes, shift)
    np.testing.assert_allclose(o, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, log, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gets_0_and_gives_no_gradient():
    q, k, v, do = drawn(0, 1, 6, 6, 2, 1, 8)
    o, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask=Causal(-2)), q, k, v)
    dq, dk, dv = pull(do)
    assert not o[:, :2].any() and o[:, 2:].any() and not dq[:, :2].any()
    assert all(bool(jnp.isfinite(x).all()) for x in (o, dq, dk, dv))
    assert not dk[:, 4:].any() and not dv[:, 4:].any()


def test_a_bias_of_distances_is_added_and_its_buckets_are_learned():
    q, k, v, do = drawn(0, 1, 5, 7, 2, 1, 8)
    table = jax.random.normal(jax.random.key(1), (3, 2))

    def bucket(distance):
        return jnp.clip(distance, -1, 1) + 1

    def ours(table):
        return attention(q, k, v, bias=bucketed(table, 5, 7, bucket, shift=2))

    def exact(table):
        logits = jnp.einsum("BTNH,BSKH->NTS", q, k, precision="highest") * 8**-0.5
        for t, s in np.ndindex(5, 7):
            logits = logits.at[:, t, s].add(table[np.clip(t + 2 - s, -1, 1) + 1])
        return jnp.einsum("NTS,BSKH->BTNH", jax.nn.softmax(logits), v, precision="highest")

    (o, pull), (expected, pull_exact) = jax.vjp(ours, table), jax.vjp(exact, table)
    np.testing.assert_allclose(o, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(*pull(do), *pull_exact(do), rtol=1e-5, atol=1e-5)


def test_dropout_drops_its_share_of_weights_and_others_of_every_row_head_and_key():
    B, T, N = 2, 40, 3
    q, k = jnp.zeros((B, T, N, 4)), jnp.zeros((B, T, N, 4))
    v = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, N, T))  # what is gathered are the weights

    def weights(seed):
        return np.asarray(attention(q, k, v, dropout=0.25, key=jax.random.key(seed))) * T

    first, again, other = weights(0), weights(0), weights(1)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first[first > 0], 1 / 0.75, rtol=1e-5)
    assert abs((first == 0).mean() - 0.25) < 0.02
    for a, b in ((first, other), (first[0], first[1]), (first[:, :, 0], first[:, :, 1]), (first[:, 1:], first[:, :-1])):
        assert abs(((a == 0) & (b == 0)).mean() - 0.25**2) < 0.02
    assert abs(((first[..., 1:] == 0) & (first[..., :-1] == 0)).mean() - 0.25**2) < 0.02


def close(ours, exact, what: str):
    most, mean = (1e-5, 1e-5) if ours.dtype == jnp.float32 else (2e-2, 1e-3)
    ours, exact = (np.asarray(x, np.float64) for x in (ours, exact))
    error, size = np.abs(ours - exact), max(np.abs(exact).max(), 1)
    assert np.isfinite(ours).all(), what
    assert error.max() <= most * size and error.mean() <= mean * size, (what, error.max(), size)


def beside_the_reference(shape, mask, dtype=jnp.bfloat16, *, implementation="gpu", interpret=False, **how):
    """Forward and gradients of kernels, of inputs of `dtype`, beside those of the reference in float32."""
    how |= dict(mask=mask, implementation=implementation, interpret=interpret)
    return of_these_beside_the_reference(*drawn(1, *shape, dtype), dtype, **how)


def of_these_beside_the_reference(q, k, v, do, dtype, *, implementation, interpret, bias=None, **how):
    def run(args, **kw):
        o, pull = jax.vjp(lambda q, k, v, bias: attention(q, k, v, bias=bias, **how, **kw), *args, bias)
        return o, *pull(do.astype(o.dtype))

    ours = run((q, k, v), implementation=implementation, interpret=interpret)
    exact = run([x.astype(jnp.float32) for x in (q, k, v)], implementation="reference")
    for name, a, b in zip(("o", "dq", "dk", "dv"), ours[:4], exact[:4], strict=True):
        assert a.dtype == dtype
        close(a, b, name)
    for a, b in zip(jax.tree.leaves(ours[4]), jax.tree.leaves(exact[4]), strict=True):
        close(a.astype(dtype), b, "bias")  # made of gradients of logits, which are rounded
    return ours[:4]


CUTS = ([60, 20, 85, 35], [1, 130, 69], [200])  # documents of rows of 200 tokens


def documents(B: int, length: int) -> Documents:
    rows = [np.resize(np.repeat(np.arange(len(cut)), cut), length) for cut in CUTS[:B]]
    return Documents(jnp.asarray(np.stack(rows)), jnp.asarray(np.stack(rows)))


def cases(B: int, T: int, N: int):
    """Masks of T queries and T keys, and what else there is."""
    prefixes = jnp.arange(B) * (T // 3)
    return {
        "causal": (Causal(), {}),
        "full": (Full(), {}),
        "documents": (Causal() & documents(B, T), {"softcap": 50.0, "scale": 2.0}),
        "window-sinks": (
            (Causal() & Window(T // 6)) | (Sinks(3) & Causal()),
            {"bias": Slopes(jnp.linspace(0.5, 0.1, N)), "softcap": 5.0},
        ),
        "prefix": ((Causal() | Prefix(prefixes)) & documents(B, T), {"scale": 0.3}),
        "global-dilated": ((Causal() & Dilated(3)) | (Global(5) & Causal()), {}),
        "nothing": (Causal(-T // 2), {}),  # whole blocks see nothing and are seen by nothing
    }  # fmt: skip


def distances(T: int, S: int, N: int) -> Distances:
    return Distances(jax.random.normal(jax.random.key(9), (N, T + S - 1)))


def cases_of_tpus(B: int, T: int, N: int):
    return cases(B, T, N) | {
        "distances": (Full(), {"bias": distances(T, T, N), "scale": 0.3}),
        "distances-softcap": (Causal() & Window(T // 3), {"bias": distances(T, T, N), "softcap": 5.0}),
        "dropout": (Causal() & documents(B, T), {"dropout": 0.3, "key": jax.random.key(5)}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "documents", "window-sinks", "prefix", "global-dilated", "nothing"])
def test_the_gpu_kernel_interpreted_is_the_reference(case):
    B, T, N, K = (2, 130, 2, 1) if case in ("documents", "prefix") else (1, 256, 2, 1)
    mask, how = cases(B, T, N)[case]
    beside_the_reference((B, T, T, N, K, 64), mask, interpret=True, **how)


@pytest.mark.slow
def test_the_gpu_kernel_interpreted_is_the_reference_over_ragged_lengths():
    beside_the_reference((1, 70, 100, 1, 1, 64), Causal(30), jnp.float16, interpret=True)


@pytest.fixture
def small_steps(monkeypatch):
    """Blocks so small that short sequences have several."""
    monkeypatch.setattr(tpu, "FORWARD", tpu.Tuning(128, 128, 4))
    monkeypatch.setattr(tpu, "BACKWARD", tpu.Tuning(128, 128, 2))


@pytest.mark.parametrize("case", cases_of_tpus(1, 1, 1))
def test_the_tpu_kernel_interpreted_is_the_reference(case, small_steps):
    B, T, N, K = (1, 640, 2, 1) if case in ("causal", "full", "window-sinks", "global-dilated") else (2, 300, 4, 2)
    mask, how = cases_of_tpus(B, T, N)[case]
    beside_the_reference((B, T, T, N, K, 64), mask, jnp.float32, implementation="tpu", interpret=True, **how)


@pytest.mark.slow
@given(
    st.data(), st.sampled_from([1, 129, 500]), st.sampled_from([70, 384]), st.sampled_from([(3, 1), (4, 2), (1, 1)]),
    st.sampled_from([(32, 32), (64, 96), (128, 128), (80, 256)]), st.none() | st.floats(1, 20),
    st.sampled_from(["nothing", "slopes", "distances"]), st.integers(-100, 100), st.sampled_from([0.0, 0.2]),
    st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)  # fmt: skip
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_tpu_kernel_interpreted_is_the_reference_whatever_the_shapes(
    small_steps, data, T, S, heads, sizes, softcap, added, shift, dropout, dtype
):
    mask = data.draw(kinds(2, T, S))
    q, k, _, _ = drawn(1, 2, T, S, *heads, sizes[0], dtype)
    _, _, v, do = drawn(2, 2, T, S, *heads, sizes[1], dtype)
    N = heads[0]
    bias = {"nothing": None, "slopes": Slopes(jnp.linspace(0.05, 0.01, N)), "distances": distances(T, S, N)}[added]
    how = dict(mask=mask, scale=0.2, softcap=softcap, shift=shift, bias=bias, dropout=dropout, key=jax.random.key(3))
    of_these_beside_the_reference(q, k, v, do, dtype, implementation="tpu", interpret=True, **how)


def test_sequences_that_have_no_room_go_through_a_tpu_by_sections(small_steps):
    B, T, N, K, H = 2, 900, 4, 2, 64
    mask = (Causal() | Prefix(jnp.asarray([40, 600]))) & documents(B, T)
    q, k, v, do = drawn(1, B, T, T, N, K, H)
    added = {"values_NX": distances(T, T, N).values_NX, "rate": 0.2, "seed": jnp.int32(7)}
    how = dict(scale=0.2, interpret=True, **added)
    results = []
    for memory in (64 << 20, (18 << 20) + 400_000):
        o, lse = tpu.forward(q, k, v, mask, memory=memory, **how)
        results.append((o, lse, *tpu.backward(q, k, v, o, lse, do, mask, memory=memory, **how)))
    values = 3 * 2048  # at most
    sections = (tpu._sections(T, x, again, memory, 128, values)[0] for x, again in ((1024, 0), (2112, 1024)))
    assert all(128 <= size < T / 2 for size in sections)
    for whole, cut in zip(*results, strict=True):
        np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-4 * float(jnp.abs(whole).max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("case", cases(3, 1000, 4))
def test_the_gpu_kernel_is_the_reference_and_gives_the_same_bits_again(hopper, case, H, dtype):
    mask, how = cases(3, 1000, 4)[case]
    first = beside_the_reference((3, 1000, 1000, 4, 2, H), mask, dtype, **how)
    again = beside_the_reference((3, 1000, 1000, 4, 2, H), mask, dtype, **how)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
def test_the_gpu_kernel_is_the_reference_over_ragged_lengths(hopper):
    beside_the_reference((2, 700, 1000, 4, 2, 128), Causal(300))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 8, 3, 64), "v": (1, 8, 3, 64)}, "N a multiple of K"),
        ({"v": (1, 9, 1, 64)}, r"\[B, S, K, V\]"),
        ({"q": (8, 2, 64)}, "4 dimensions"),
        ({"implementation": "flash"}, "unknown implementation 'flash'; known: gpu, tpu, triton, reference"),
        ({"implementation": "gpu"}, "bfloat16 and float16, not float32"),
        (
            {"implementation": "gpu", "dtype": jnp.bfloat16, "chip": "Tesla V100"},
            "needs a Hopper GPU, this is Tesla V100",
        ),
        ({"scale": -1.0}, "scale=-1.0 must be positive"),
        ({"bias": Slopes(jnp.ones(3))}, "one of each of 2 query heads"),
        ({"bias": Distances(jnp.ones((2, 16)))}, "of 2 query heads and 15 distances"),
        ({"dropout": 0.5}, "dropout=0.5 needs a key"),
        ({"dropout": 1.0}, "at least 0 and less than 1"),
        (
            {"implementation": "gpu", "dtype": jnp.bfloat16, "bias": Distances(jnp.ones((2, 15)))},
            "implementation='gpu': it lacks a bias of distances",
        ),
        ({"mask": Prefix(jnp.ones(2, jnp.int32))}, r"mask's array of row has shape \(2,\), wanted \(1,\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    shapes = {"q": (1, 8, 2, 64), "k": (1, 8, 1, 64), "v": (1, 8, 1, 64)}
    change = dict(change)
    dtype = change.pop("dtype", jnp.float32)
    arrays = [jnp.zeros(change.get(name, shape), dtype) for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=message):
        attention(*arrays, **{name: value for name, value in change.items() if name not in shapes})


@pytest.mark.parametrize(
    ("chip", "kernels"),
    [
        ("NVIDIA H100 80GB HBM3", {"gpu", "triton"}), ("NVIDIA A100-SXM4-40GB", {"triton"}), ("NVIDIA L4", {"triton"}),
        ("NVIDIA A10G", {"triton"}), ("NVIDIA GeForce RTX 4090", {"triton"}), ("NVIDIA RTX A6000", {"triton"}),
        ("NVIDIA B200", {"triton"}), ("NVIDIA RTX 6000 Ada Generation", {"triton"}), ("Tesla V100-SXM2-16GB", set()),
        ("Tesla T4", set()), ("NVIDIA GeForce RTX 2080 Ti", set()), ("Quadro RTX 4000", set()),
        ("NVIDIA Quadro RTX 4000", set()), ("Intel(R) Arc(TM) A770 Graphics", set()), ("TPU v5 lite", {"tpu"}),
        ("TPU7x", {"tpu"}), ("TPU v6 lite", {"tpu"}), ("TPU v4", set()), ("TPU v4 lite", set()), ("cpu", set()),
    ],
)  # fmt: skip
def test_kernels_know_their_chips(chip, kernels):
    assert {name for name, kind in api.CHIPS.items() if kind.has(chip)} == kernels


def test_a_head_that_the_kernel_cannot_take_is_told():
    x = jnp.zeros((1, 8, 1, 80), jnp.bfloat16)
    with pytest.raises(ValueError, match="heads of 64 and 128, not of 80"):
        attention(x, x, x, implementation="gpu")

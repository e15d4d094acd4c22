"""Masks: what they say of blocks is true of every pair in them."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import masks
from pallas_kernels.attention.masks import Causal, Dilated, Documents, Full, Global, Prefix, Sinks, Window

sides = st.none() | st.integers(0, 20)
shifts = st.integers(-15, 15)
SIZES = st.sampled_from([(1, 1), (7, 5), (40, 40), (16, 33)])  # of queries and keys


def kinds(B: int, T: int, S: int):
    """Any mask of the algebra, for B rows of T queries and S keys."""

    def ids(seed: int) -> Documents:
        rng = np.random.default_rng(seed)
        q, k = (np.sort(rng.integers(0, 4, (B, n), dtype=np.int32), 1) for n in (T, S))
        return Documents(jnp.asarray(q), jnp.asarray(q if T == S else k))

    def prefix(seed: int) -> Prefix:
        return Prefix(jnp.asarray(np.random.default_rng(seed).integers(0, S + 1, B, dtype=np.int32)))

    leaves = st.one_of(
        st.just(Full()), st.builds(Window, sides, sides, shifts), st.builds(Causal, shifts),
        st.builds(Sinks, st.integers(0, 9)), st.builds(Global, st.integers(0, 9), shifts),
        st.builds(Dilated, st.integers(1, 5), shifts), st.builds(ids, st.integers(0, 9)),
        st.builds(prefix, st.integers(0, 9)),
    )  # fmt: skip
    return st.recursive(
        leaves, lambda m: st.builds(lambda a, b, o: a & b if o else a | b, m, m, st.booleans()), max_leaves=4
    )


# Few sizes: each compiles anew.
@given(st.data(), SIZES, st.sampled_from([(1, 1), (4, 8), (12, 5)]), st.booleans())
@settings(max_examples=100, derandomize=True, deadline=None)
def test_blocks_without_work_are_empty_and_full_ones_are_full(data, sizes, blocks, by_keys):
    (T, S), (q, k) = sizes, blocks
    mask = data.draw(kinds(2, T, S))
    by = "keys" if by_keys else "queries"
    todo = jax.tree.map(np.asarray, masks.work(mask, q, k, T, S, by=by))
    seen = np.array(masks.dense(mask, T, S))
    for w in range(todo.order.shape[0]):
        rows = seen if len(seen) == 1 else seen[w : w + 1] if todo.order.shape[0] > 1 else seen
        for i in range(todo.partial.shape[1]):
            order, partial, full = todo.order[w, i], todo.partial[w, i], todo.full[w, i]
            assert sorted(order) == list(range(len(order)))
            for step, j in enumerate(order):
                qi, kj = (j, i) if by_keys else (i, j)
                block = rows[:, qi * q : (qi + 1) * q, kj * k : (kj + 1) * k]
                if partial <= step < partial + full:
                    assert block.all() and (kj + 1) * k <= S
                elif step >= partial + full:
                    assert not block.any()


def test_causal_work_is_half_and_that_of_a_window_or_documents_is_theirs():
    def count(mask):
        return [int(x.sum()) for x in masks.work(mask, 128, 128, 4096, 4096)[1:]]

    assert count(Causal()) == [32, 32 * 31 // 2]
    assert count(Causal() & Window(127)) == [32 + 31, 0]
    documents = jnp.repeat(jnp.arange(8), 512)[None]
    assert count(Causal() & Documents(documents, documents)) == [32, 8 * 4 * 3 // 2]
    assert count((Causal() & Window(127)) | Sinks(4)) == [32 + 31 + 30, 0]


def test_masks_show_what_their_papers_draw():
    def drawn(mask, T=6):
        return ["".join(".x"[int(x)] for x in row) for row in np.array(masks.dense(mask, T, T))[0]]

    assert drawn(Causal() & Window(1)) == ["x.....", "xx....", ".xx...", "..xx..", "...xx.", "....xx"]
    assert drawn((Causal() & Window(1)) | (Sinks(1) & Causal()))[3:] == ["x.xx..", "x..xx.", "x...xx"]
    assert drawn(Causal() & Dilated(2)) == ["x.....", ".x....", "x.x...", ".x.x..", "x.x.x.", ".x.x.x"]
    assert drawn(Global(1) | Window(0, 0)) == ["xxxxxx", "xx....", "x.x...", "x..x..", "x...x.", "x....x"]
    assert drawn(Causal() | Prefix(jnp.asarray([3])))[0] == "xxx..."
    documents = jnp.asarray([[1, 1, 2, 2, 2, 3]])
    assert drawn(Causal() & Documents(documents, documents)) == [
        "x.....",
        "xx....",
        "..x...",
        "..xx..",
        "..xxx.",
        ".....x",
    ]


def test_a_mask_passes_through_jit_and_its_shape_is_static():
    documents = jnp.asarray([[0, 0, 1, 1]])
    traced = []

    @jax.jit
    def seen(mask):
        traced.append(mask)
        return masks.dense(mask, 4, 4)

    first = seen(Causal() & Documents(documents, documents))
    np.testing.assert_array_equal(first, masks.dense(Causal() & Documents(documents, documents), 4, 4))
    seen(Causal() & Documents(documents + 1, documents + 1))
    assert len(traced) == 1
    seen(Causal(1) & Documents(documents, documents))
    assert len(traced) == 2

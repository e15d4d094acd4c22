import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.core.config import Config, parse
from jaxllm.models.config import DecoderConfig
from jaxllm.models.masks import All, Causal, Coords, Document, Full, Mask, Prefix, Some, Window

T = 7

LEAVES = st.one_of(
    st.sampled_from([Causal(), Full(), Prefix(), Document()]),
    st.builds(Window, left=st.integers(1, T), right=st.integers(0, 3)),
)
MASKS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        *(st.builds(kind, of=st.lists(inner, min_size=1, max_size=3).map(tuple)) for kind in (All, Some))
    ),
    max_leaves=5,
)
DOCUMENTS = st.lists(st.integers(0, 2), min_size=T, max_size=T)
PREFIXES = st.lists(st.booleans(), min_size=T, max_size=T)


def pairs(mask: Mask, documents: list[int], prefix: list[bool]) -> set[tuple[int, int]]:
    """(query, key) that `mask` lets see, from its definition in words, as sets."""
    everything = {(q, k) for q in range(T) for k in range(T)}
    match mask.kind:
        case "causal":
            return {(q, k) for q in range(T) for k in range(q + 1)}
        case "full":
            return everything
        case "prefix":
            return {(q, k) for q, k in everything if prefix[k]}
        case "window":
            return {(q, k) for q in range(T) for k in range(q - mask.left + 1, q + mask.right + 1)} & everything
        case "document":
            return {(q, k) for q, k in everything if documents[q] == documents[k]}
        case "all":
            return set.intersection(*(pairs(m, documents, prefix) for m in mask.of))
        case "some":
            return set.union(*(pairs(m, documents, prefix) for m in mask.of))


def visible(mask: Mask, documents: list[int], prefix: list[bool]) -> np.ndarray:
    index, document, prefix = np.arange(T), np.array(documents), np.array(prefix)
    seen = mask.visible(
        Coords(index[:, None], document[:, None], prefix[:, None]), Coords(index[None], document[None], prefix[None])
    )
    return np.broadcast_to(seen, (T, T))


@given(MASKS, DOCUMENTS, PREFIXES)
def test_a_mask_is_the_set_of_pairs_its_words_say(mask, documents, prefix):
    assert set(zip(*map(tuple, np.nonzero(visible(mask, documents, prefix))), strict=True)) == pairs(
        mask, documents, prefix
    )


@given(MASKS, MASKS, DOCUMENTS, PREFIXES)
def test_and_is_intersection_and_or_is_union(a, b, documents, prefix):
    seen_a, seen_b = visible(a, documents, prefix), visible(b, documents, prefix)
    assert np.array_equal(visible(a & b, documents, prefix), seen_a & seen_b)
    assert np.array_equal(visible(a | b, documents, prefix), seen_a | seen_b)


@given(MASKS, DOCUMENTS)
def test_a_decodable_mask_shows_no_token_after_the_prefix_to_those_before_it(mask, documents):
    ahead = np.triu(np.ones((T, T), bool), 1)
    if mask.decodable:
        assert not (visible(mask, documents, [False] * T) & ahead).any()


@pytest.mark.parametrize("mask", [Full(), Document(), Window(left=3, right=1), Causal() | Full(), Full() & Document()])
def test_masks_that_look_ahead_are_not_decodable(mask):
    assert not mask.decodable
    assert np.triu(visible(mask, [1] * T, [False] * T), 1).any()


@given(MASKS)
def test_a_mask_survives_its_yaml(mask):
    class Holder(Config):
        mask: Mask

    assert parse(Holder, Holder(mask=mask).model_dump(mode="json")).mask == mask


def test_a_mask_is_spelt_by_its_names_alone():
    tree = {"block": {"attention": {"mask": {"kind": "some", "of": ["causal", "prefix"]}}}}
    assert DecoderConfig.model_validate(tree).block.attention.mask == Causal() | Prefix()


def test_masks_answer_for_jax_arrays_too():
    index = jnp.arange(T)
    coords = index, jnp.ones(T, int), jnp.zeros(T, bool)
    mask = Window(left=3) & Document()
    seen = mask.visible(Coords(*(c[:, None] for c in coords)), Coords(*(c[None] for c in coords)))
    assert np.array_equal(seen, visible(mask, [1] * T, [False] * T))

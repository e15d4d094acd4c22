"""Random mixtures of transformers, as tests/interop/test_decoders.py does with dense models."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_decoders import (
    assert_same_continuations,
    assert_same_files,
    assert_same_logits,
    few,
    flag,
    layer_types,
    llama_like,
    of,
    opened,
    randomised,
)

from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.interop.folder import BY_KIND
from jaxllm.interop.mixtures import FAMILIES
from jaxllm.models.config import DecoderConfig

transformers = pytest.importorskip("transformers")


def sizes(draw: Any, **more: Any) -> dict[str, Any]:
    """Of a LLaMA, in multiples of 4: torch's grouped product, with which transformers computes, takes no others."""
    c = llama_like(draw, **more)
    return c | {"hidden_size": 8 * c["num_attention_heads"], "intermediate_size": draw(of([20, 36]))}


def experts(draw: Any, name: str) -> dict[str, Any]:
    count = draw(of([2, 3, 5]))
    return {name: count, "num_experts_per_tok": draw(st.integers(1, count))}


def mixtral(draw: Any) -> Any:
    c = sizes(draw, head_dim=draw(of([None, 4, 16])), sliding_window=draw(of([None, 3, 9])))
    return transformers.MixtralConfig(
        **c, **experts(draw, "num_local_experts"), router_jitter_noise=draw(of([0.0, 0.1]))
    )


def _qwen(draw: Any, **more: Any) -> dict[str, Any]:
    c = sizes(draw, **more)
    L = c["num_hidden_layers"]
    alone = draw(st.sets(st.integers(0, L - 1), max_size=L - 1))
    step = draw(of([n for n in (1, 2) if set(range(n - 1, L, n)) - alone]))  # one mixture at least
    return c | experts(draw, "num_experts") | {
        "moe_intermediate_size": draw(of([8, 12])), "norm_topk_prob": draw(flag), "mlp_only_layers": sorted(alone),
        "decoder_sparse_step": step,
    }  # fmt: skip


def qwen2_moe(draw: Any) -> Any:
    c = _qwen(draw, use_sliding_window=draw(flag), sliding_window=4, qkv_bias=draw(flag))
    c["shared_expert_intermediate_size"] = draw(of([4, 24]))
    return transformers.Qwen2MoeConfig(
        **c, layer_types=layer_types(draw, c["num_hidden_layers"]) if c["use_sliding_window"] else None
    )


def qwen3_moe(draw: Any) -> Any:
    windowed = {"use_sliding_window": draw(flag), "sliding_window": 4}
    return transformers.Qwen3MoeConfig(**_qwen(draw, head_dim=draw(of([4, 8])), attention_bias=draw(flag), **windowed))


def olmoe(draw: Any) -> Any:
    c = sizes(draw, attention_bias=draw(flag), norm_topk_prob=draw(flag))
    return transformers.OlmoeConfig(**c, **experts(draw, "num_experts"))


DRAWN = {f.__name__: f for f in (mixtral, qwen2_moe, qwen3_moe, olmoe)}


def test_every_family_is_drawn():
    assert [family.kind for family in FAMILIES] == list(DRAWN)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_a_random_mixture_is_read_computed_continued_and_written_as_transformers_does(name, tmp_path_factory):
    @few
    @given(st.data(), st.integers(0, 2**31))
    def check(data: st.DataObject, seed: int) -> None:
        folder = tmp_path_factory.mktemp(name)
        model = randomised(DRAWN[name](data.draw), seed)
        model.save_pretrained(folder / "theirs")
        ours, read = opened(folder / "theirs")
        assert_same_logits(model, ours, seed)
        assert_same_continuations(model, ours, seed)
        assert_same_files(model, read, folder)

    check()


# What config.json says on the hub, as far as it tells the shape (mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen1.5-MoE-A2.7B,
# Qwen/Qwen3-30B-A3B); transformers 5 writes num_local_experts for the last.
QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "rope_theta": 1e6, "max_position_embeddings": 40_960, "tie_word_embeddings": False,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 48, "rms_norm_eps": 1e-6,
    "attention_bias": False, "hidden_act": "silu", "rope_scaling": None,
}  # fmt: skip


def test_the_number_of_experts_is_read_under_either_name():
    read = BY_KIND["qwen3_moe"].ours
    renamed = {
        k.replace("num_experts", "num_local_experts") if k == "num_experts" else k: v for k, v in QWEN3_30B.items()
    }
    assert read(renamed) == read(QWEN3_30B)
    written = BY_KIND["qwen3_moe"].theirs(read(QWEN3_30B))
    assert written["num_experts"] == written["num_local_experts"] == 128


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_experts": None}, "num_experts=null; must be the number of experts"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0; must be 1 or more"),
        ({"num_experts_per_tok": 129}, "top_k=129 must not be above experts=128"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(changes, reason):
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        BY_KIND["qwen3_moe"].ours(QWEN3_30B | changes)


def test_windows_of_unsaid_layers_are_refused():
    with pytest.raises(CheckpointError, match="layer_types.*must say which layers have a window"):
        BY_KIND["qwen2_moe"].ours(QWEN3_30B | {"use_sliding_window": True, "sliding_window": 4096})


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("ffn", ["dense", {"kind": "moe", "router": "sigmoid"}, {"kind": "moe", "capacity": "factor"}])
def test_a_model_that_a_family_of_mixtures_does_not_have_is_not_written(kind, ffn):
    with pytest.raises(ConfigError, match="block.ffn"):
        BY_KIND[kind].theirs(DecoderConfig.model_validate({"vocab": 61, "block": {"ffn": ffn}}))


def test_a_dense_family_has_no_mixtures():
    with pytest.raises(ConfigError, match="block.ffn.kind is 'moe', there 'dense'"):
        BY_KIND["llama"].theirs(DecoderConfig.model_validate({"vocab": 61, "block": {"ffn": "moe"}}))

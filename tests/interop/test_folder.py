"""Which family a model of ours is written as, where none is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxllm import presets
from jaxllm.cli import main
from jaxllm.core.errors import ConfigError
from jaxllm.data.config import ByteTokenizer
from jaxllm.data.tokenizers import build
from jaxllm.interop.family import differences, resolved
from jaxllm.interop.folder import BY_KIND, FAMILIES, fitting, open_folder
from jaxllm.models.config import DecoderConfig
from jaxllm.models.module import create
from jaxllm.train.checkpoint import Checkpointer
from jaxllm.train.config import Checkpoints
from tests.inference.test_generate import decoders

SMALL = {
    "vocab_size": 259, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
}  # fmt: skip
FIRST = {  # config.json of a small model, by the family that it is of and no earlier one is
    "bloom": {"vocab_size": 259, "hidden_size": 24, "n_layer": 2, "n_head": 3},
    "mpt": {"vocab_size": 259, "d_model": 24, "n_layers": 2, "n_heads": 3},
    "falcon": SMALL | {"alibi": True},
    "baichuan": SMALL | {"model_max_length": 64},
    "gemma3_text": SMALL | {"num_hidden_layers": 7, "num_key_value_heads": 1, "sliding_window": 4, "head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("kind", FIRST)
def test_a_model_goes_out_as_its_family_without_being_asked(kind, tmp_path):
    cfg = BY_KIND[kind].ours(FIRST[kind]).model_copy(update={"context": 64})
    files = {"tokenizer": build(ByteTokenizer()).save, "config.yaml": "precision: {kind: float32}\n"}
    params = jax.jit(lambda key: create(cfg, key))(jax.random.key(0))
    with Checkpointer(tmp_path / "run" / "checkpoints", Checkpoints(), cfg, extra_files=files) as saver:
        saver.save(0, {"step": jnp.int32(0), "params": params}, {})
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "folder")]) == 0
    read = open_folder(tmp_path / "folder")
    assert read.family.kind == kind and not differences(resolved(read.cfg), resolved(cfg))
    np.testing.assert_array_equal(read.weights["embedding"], params["embedding"])


@settings(max_examples=20)
@given(decoders())
def test_a_model_is_of_a_family_that_gives_it_back_or_of_none(fields):
    cfg = DecoderConfig(**fields)
    try:
        family = fitting(cfg)
    except ConfigError as e:
        assert "no family that is known here has such a model; closest:" in str(e) and "another kind" not in str(e)
    else:
        assert not differences(resolved(family.ours(family.theirs(cfg))), resolved(cfg))


PUBLISHED = (  # one of each kind of position, and encoders and encoder-decoders
    "gpt2", "gpt_j_6b", "llama2_7b", "gemma3_4b", "falcon_7b", "bloom_176b", "baichuan_13b", "mpt_7b", "ctrl_1.6b",
    "glm_130b", "mixtral_8x7b", "roberta_base", "mpnet_base", "deberta_v3_base", "albert_base", "t5_small", "bart_base",
)  # fmt: skip


def test_every_family_has_a_published_model_or_refuses_it():
    for name in PUBLISHED:
        cfg, found = presets.preset(name), []
        for family in FAMILIES:
            try:
                family.theirs(cfg)  # what comes back is compared there
                found.append(family.kind)
            except ConfigError:
                pass
        assert presets.published()[name].folders in found

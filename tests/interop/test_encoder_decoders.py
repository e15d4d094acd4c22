"""Encoder-decoders of transformers with random weights and configs: logits, what they write, and their files."""

from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from jaxllm.inference.generate import generate
from jaxllm.interop.folder import open_folder
from jaxllm.interop.weights import load
from jaxllm.models.module import abstract, merge

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.interop import oracle  # noqa: E402
from tests.interop.test_decoders import few  # noqa: E402
from tests.interop.test_encoders import packed  # noqa: E402

V, CONTEXT = 50, 40
READ, WRITTEN = (5, 9, 3), (4, 2, 7)
of, flag = st.sampled_from, st.booleans()


def _t5(draw: Any) -> dict[str, Any]:
    return {
        "vocab_size": V, "d_model": draw(of([16, 24])), "d_kv": draw(of([4, 8])), "num_heads": draw(of([1, 2, 3])),
        "d_ff": draw(of([20, 33])), "num_layers": draw(of([2, 3])), "num_decoder_layers": draw(of([1, 2])),
        "relative_attention_num_buckets": draw(of([8, 32])), "relative_attention_max_distance": draw(of([20, 128])),
        "feed_forward_proj": draw(of(["relu", "gated-gelu", "gated-silu", "gelu_new"])), "decoder_start_token_id": 0,
        "layer_norm_epsilon": draw(of([1e-6, 1e-3])),
    }  # fmt: skip


def t5(draw):
    return transformers.T5Config(**_t5(draw), tie_word_embeddings=True)


def t5_unscaled(draw):
    return transformers.T5Config(**_t5(draw), tie_word_embeddings=False)


def mt5(draw):
    return transformers.MT5Config(**_t5(draw))


def umt5(draw):
    return transformers.UMT5Config(**_t5(draw))


def _bart(draw: Any) -> dict[str, Any]:
    heads = draw(of([1, 2, 4]))
    return {
        "vocab_size": V, "d_model": heads * draw(of([4, 8])), "encoder_layers": draw(of([1, 2])),
        "decoder_layers": draw(of([1, 3])), "encoder_attention_heads": heads, "decoder_attention_heads": heads,
        "encoder_ffn_dim": draw(of([20, 33])), "decoder_ffn_dim": draw(of([20, 33])),
        "max_position_embeddings": CONTEXT, "activation_function": draw(of(["gelu", "relu"])),
        "scale_embedding": draw(flag), "decoder_start_token_id": 2, "forced_eos_token_id": None,
    }  # fmt: skip


def bart(draw):
    return transformers.BartConfig(**_bart(draw))


def mbart(draw):
    return transformers.MBartConfig(**_bart(draw))


def pegasus(draw):
    return transformers.PegasusConfig(**_bart(draw))


DRAWN = {f.__name__: f for f in (t5, t5_unscaled, mt5, umt5, bart, mbart, pegasus)}


def randomised(config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    kind = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5", "bart": "Bart", "mbart": "MBart", "pegasus": "Pegasus"}
    model = getattr(transformers, kind[config.model_type] + "ForConditionalGeneration")
    model = oracle.randomised(model._from_config(config, attn_implementation="eager"), seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.forced_eos_token_id = None
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_a_random_model_reads_and_writes_as_that_of_transformers_does(name, tmp_path_factory):
    @few
    @given(st.data(), st.integers(0, 2**31))
    def check(data: st.DataObject, seed: int) -> None:
        folder = tmp_path_factory.mktemp(name)
        model = randomised(DRAWN[name](data.draw), seed)
        model.save_pretrained(folder / "theirs")
        read = open_folder(folder / "theirs")
        graphdef, shapes, _ = abstract(read.cfg)
        ours = merge(graphdef, load(read.weights, read.cfg, shapes))
        assert_same_logits(model, ours, seed)
        assert_same_outputs(model, ours, seed)
        again = oracle.assert_same_tensors(model, read, folder)
        ids = torch.arange(3, 14)[None]
        with torch.no_grad():
            a, b = (m(input_ids=ids, decoder_input_ids=ids[:, 4:]).logits for m in (again, model))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)

    check()


def assert_same_logits(model: Any, ours: Any, seed: int) -> None:
    """Pairs of documents packed in two rows, against transformers' one by one."""
    rng = np.random.default_rng(seed)
    read, written = ([rng.integers(3, V, n) for n in lengths] for lengths in (READ, WRITTEN))
    documents = lambda lengths: packed([np.full(n, i + 1) for i, n in enumerate(lengths)])
    positions = lambda lengths: packed([np.arange(n) for n in lengths])
    got = jax.jit(
        lambda m, *row, read: m(*row, read_BS=read[0], read_positions_BS=read[1], read_documents_BS=read[2])
    )(
        ours, packed(written), positions(WRITTEN), documents(WRITTEN),
        read=(packed(read), positions(READ), documents(READ)),
    )  # fmt: skip
    wanted = []
    for x, y in zip(read, written, strict=True):
        with torch.no_grad():
            out = model(input_ids=torch.tensor(x)[None], decoder_input_ids=torch.tensor(y)[None])
        wanted.append(out.logits[0].numpy())
    np.testing.assert_allclose(got[0, : sum(WRITTEN)], np.concatenate(wanted), atol=1e-4, rtol=0)


def assert_same_outputs(model: Any, ours: Any, seed: int) -> None:
    """Inputs of different lengths in one batch, 16 tokens each."""
    rng = np.random.default_rng(seed + 1)
    prompts = [rng.integers(3, V, n).tolist() for n in (3, 8)]
    said = generate(ours, prompts, max_new_tokens=16)
    for prompt, completion in zip(prompts, said, strict=True):
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, num_beams=1)
        assert list(completion.tokens) == out[0, 1:].tolist()

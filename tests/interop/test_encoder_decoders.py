"""Encoder-decoders of transformers with random weights and configs: logits, what they write, and their files."""

from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from jaxllm import presets
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.inference.generate import generate
from jaxllm.interop.encoder_decoders import FAMILIES, SWITCH
from jaxllm.interop.folder import BY_KIND, open_folder
from jaxllm.interop.weights import Weights, load
from jaxllm.models.module import abstract, merge

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.interop import oracle  # noqa: E402
from tests.interop.test_decoders import few  # noqa: E402
from tests.interop.test_encoders import packed, padded  # noqa: E402

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


def switch_transformers(draw):
    c = _t5(draw) | {"dense_act_fn": draw(of(["relu", "gelu_new"])), "num_experts": draw(of([2, 3, 5]))}
    steps = {"encoder_sparse_step": draw(of([1, 2, 3])), "decoder_sparse_step": draw(of([0, 1, 2]))}
    return transformers.SwitchTransformersConfig(
        **{k: x for k, x in c.items() if k != "feed_forward_proj"}, **steps, router_bias=draw(flag), pad_token_id=0,
        expert_capacity=draw(of([20, 64])), router_jitter_noise=draw(of([0.0, 0.1])),
    )  # fmt: skip


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


def marian(draw):
    more = {"activation_function": draw(of(["relu", "swish"])), "pad_token_id": 0, "bos_token_id": 0}
    return transformers.MarianConfig(**_bart(draw) | more)


DRAWN = {f.__name__: f for f in (t5, t5_unscaled, mt5, umt5, switch_transformers, bart, mbart, pegasus, marian)}
CLASSES = {family.model_types[0]: family.architecture for family in FAMILIES}


def randomised(config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[config.model_type])
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


def test_experts_take_as_many_tokens_of_a_row_as_those_of_transformers():
    config = transformers.SwitchTransformersConfig(
        vocab_size=V, d_model=16, d_kv=4, num_heads=2, d_ff=20, num_layers=2, num_decoder_layers=2, num_experts=2,
        encoder_sparse_step=2, decoder_sparse_step=1, expert_capacity=2, decoder_start_token_id=0,
    )  # fmt: skip
    model = randomised(config, 0)
    cfg = SWITCH.ours(config.to_dict())
    tensors = {n: x.numpy() for n, x in model.state_dict().items()}
    of_theirs = Weights(SWITCH, cfg, tensors, tensors.__getitem__, "random")
    graphdef, shapes, _ = abstract(cfg)
    ours = merge(graphdef, load(of_theirs, cfg, shapes))
    rng = np.random.default_rng(0)
    read, written = ([rng.integers(3, V, n) for n in lengths] for lengths in (READ, WRITTEN))
    places = lambda parts: (padded([np.arange(len(x)) for x in parts]), padded([np.ones(len(x)) for x in parts]))
    (at, real), (read_at, read_real) = places(written), places(read)
    got = jax.jit(ours.__class__.__call__)(
        ours, padded(written), at, real, read_BS=padded(read), read_positions_BS=read_at, read_documents_BS=read_real
    )
    dropped = 0
    for x, y, logits in zip(read, written, got, strict=True):
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(x)[None], decoder_input_ids=torch.tensor(y)[None], output_router_logits=True
            )
        dropped += sum(
            int((one[0].argmax(-1).bincount() > 2).sum()) for one in out.encoder_router_logits if one.numel()
        )
        np.testing.assert_allclose(logits[: len(y)], out.logits[0].numpy(), atol=1e-4, rtol=0)
    assert dropped > 0


@pytest.mark.parametrize(
    ("kind", "said", "reason"),
    [
        ("t5", {"num_decoder_layers": 10**12}, "num_decoder_layers=1000000000000; a decoder has 1 to 10000 layers"),
        ("switch_transformers", {"decoder_sparse_step": -1}, "decoder_sparse_step=-1; must be 0 or more"),
        (
            "switch_transformers",
            {"router_dtype": "bfloat16"},
            "router_dtype=.bfloat16.; .* is read with .float32. only",
        ),
        ("marian", {"vocab_size": 9, "decoder_vocab_size": 8}, "decoder_vocab_size=8; must be vocab_size=9"),
    ],
)
def test_a_model_that_cannot_be_computed_is_refused(kind, said, reason):
    with pytest.raises(CheckpointError, match=reason):
        BY_KIND[kind].ours(said)


def test_layers_that_files_leave_out_are_sparse_as_often_as_they_say():
    """Of 12 layers 6: every second; of 12 none: transformers 5 makes the second one sparse nonetheless."""
    said = {"num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 0}
    sides = (SWITCH.ours(said).encoder, SWITCH.ours(said).decoder)
    sparse = [[i for i in range(12) if side.layer(i).ffn.kind == "moe"] for side in sides]
    config = transformers.SwitchTransformersConfig(**said)
    assert (config.encoder_sparse_step, config.decoder_sparse_step) == (2, 12)
    assert sparse == [[1, 3, 5, 7, 9, 11], [1]]


def test_a_switch_transformer_without_experts_is_not_written():
    with pytest.raises(ConfigError, match="a Switch Transformer has experts"):
        SWITCH.theirs(presets.preset("t5_small"))

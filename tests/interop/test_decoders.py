"""Random models of transformers, saved by it and read here: the same logits, the same continuations, the same files."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jaxllm.inference.generate import generate
from jaxllm.interop.decoders import FAMILIES
from jaxllm.interop.folder import BY_KIND, open_folder
from jaxllm.interop.weights import load
from jaxllm.models.module import abstract, merge

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.interop import oracle  # noqa: E402

V, CONTEXT = 61, 64
LENGTHS, T = (7, 1, 12), 24
few = settings(max_examples=3, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
of = st.sampled_from
flag = st.booleans()
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def heads(draw: Any, *, kv: bool = True) -> dict[str, int]:
    """Sizes of attention: N heads in K groups, of H elements, and a width that need not be N H."""
    N, H = draw(of([2, 3, 4])), draw(of([4, 8]))
    K = draw(of([k for k in (1, 2, 3, 4) if N % k == 0])) if kv else N
    return {"N": N, "K": K, "H": H, "D": N * draw(of([6, 8, 10])), "L": draw(of([1, 2, 3, 5])), "F": draw(of([20, 33]))}


def rope(draw: Any, theta: bool = True) -> dict[str, Any]:
    return {"rope_theta": draw(of([100.0, 10_000.0, 500_000.0])) if theta else 10_000.0, **draw(of(SCALINGS))}


SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "mscale": 0.7,
     "mscale_all_dim": 1.3},
]  # fmt: skip


def llama_like(draw: Any, **more: Any) -> dict[str, Any]:
    s = heads(draw)
    return {
        "vocab_size": V, "hidden_size": s["D"], "intermediate_size": s["F"], "num_hidden_layers": s["L"],
        "num_attention_heads": s["N"], "num_key_value_heads": s["K"], "max_position_embeddings": CONTEXT,
        "rms_norm_eps": draw(of([1e-6, 1e-3])), "tie_word_embeddings": draw(flag), "rope_parameters": rope(draw),
        "hidden_act": draw(of(["silu", "gelu", "gelu_new", "relu", "tanh", "quick_gelu"])), **more,
    }  # fmt: skip


def layer_types(draw: Any, count: int) -> list[str]:
    return [draw(of(["sliding_attention", "full_attention"])) for _ in range(count)]


def llama(draw: Any) -> Any:
    c = llama_like(draw, head_dim=draw(of([4, 6, 8])), attention_bias=draw(flag), mlp_bias=draw(flag))
    return transformers.LlamaConfig(**c)


def mistral(draw: Any) -> Any:
    return transformers.MistralConfig(
        **llama_like(draw, head_dim=draw(of([4, 8])), sliding_window=draw(of([None, 3, 9])))
    )


def qwen2(draw: Any) -> Any:
    c = llama_like(draw, use_sliding_window=draw(flag), sliding_window=4, max_window_layers=draw(of([0, 1, 2])))
    return transformers.Qwen2Config(**_even_heads(c))


def qwen3(draw: Any) -> Any:
    c = llama_like(
        draw, head_dim=draw(of([4, 8])), attention_bias=draw(flag), use_sliding_window=draw(flag), sliding_window=4
    )
    types = layer_types(draw, c["num_hidden_layers"]) if c["use_sliding_window"] else None
    return transformers.Qwen3Config(**c, layer_types=types)


def _even_heads(c: dict[str, Any]) -> dict[str, Any]:
    """Families without head_dim: heads divide the width."""
    return c | {"hidden_size": c["num_attention_heads"] * 8}


def gemma(draw: Any) -> Any:
    return transformers.GemmaConfig(**llama_like(draw, head_dim=draw(of([4, 8])), attention_bias=draw(flag)))


def _gemma2(draw: Any) -> dict[str, Any]:
    c = llama_like(draw, head_dim=draw(of([4, 8])), query_pre_attn_scalar=draw(of([5, 16])), sliding_window=4)
    c["hidden_activation"] = c.pop("hidden_act")
    c |= {"final_logit_softcapping": draw(of([None, 3.0])), "attn_logit_softcapping": draw(of([None, 2.0]))}
    return c | {"attn_implementation": "eager", "layer_types": layer_types(draw, c["num_hidden_layers"])}


def gemma2(draw: Any) -> Any:
    return transformers.Gemma2Config(**_gemma2(draw))


def gemma3_text(draw: Any) -> Any:
    c = _gemma2(draw) | {"attn_logit_softcapping": None}
    c["rope_parameters"] = {
        "full_attention": draw(of(SCALINGS[:2])) | {"rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    return transformers.Gemma3TextConfig(**c)


def olmo(draw: Any) -> Any:
    c = llama_like(draw, attention_bias=draw(flag), clip_qkv=draw(of([None, 0.5])))
    return transformers.OlmoConfig(**_even_heads(c))


def olmo2(draw: Any) -> Any:
    return transformers.Olmo2Config(**_even_heads(llama_like(draw, attention_bias=draw(flag))))


def phi3(draw: Any) -> Any:
    c = _even_heads(llama_like(draw, sliding_window=draw(of([None, 5]))))
    fraction = draw(of([1.0, 0.5]))
    c["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": fraction}
    if draw(flag):
        size = round(4 * fraction)
        c["rope_parameters"] |= {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(size)],
            "long_factor": [1.0 + i for i in range(size)],
            "original_max_position_embeddings": 10,
        }
        c["original_max_position_embeddings"] = 10
    return transformers.Phi3Config(**c)


def phi(draw: Any) -> Any:
    c = _even_heads(llama_like(draw, qk_layernorm=draw(flag), layer_norm_eps=1e-4))
    c.pop("rms_norm_eps")
    c["rope_parameters"] = rope(draw) | {"partial_rotary_factor": draw(of([0.5, 1.0, 0.25]))}
    return transformers.PhiConfig(**c | {"tie_word_embeddings": False})


def starcoder2(draw: Any) -> Any:
    c = _even_heads(llama_like(draw, norm_epsilon=1e-4, use_bias=draw(flag), sliding_window=draw(of([None, 4]))))
    c.pop("rms_norm_eps")
    return transformers.Starcoder2Config(**c)


def _gpt2_sizes(draw: Any) -> dict[str, Any]:
    s = heads(draw, kv=False)
    return {
        "vocab_size": V, "n_embd": s["N"] * s["H"], "n_layer": s["L"], "n_head": s["N"], "n_positions": CONTEXT,
        "layer_norm_epsilon": draw(of([1e-5, 1e-3])),
    }  # fmt: skip


def gpt2(draw: Any) -> Any:
    return transformers.GPT2Config(
        **_gpt2_sizes(draw), n_inner=draw(of([None, 40])), activation_function=draw(of(["gelu_new", "relu"])),
        scale_attn_weights=draw(flag), scale_attn_by_inverse_layer_idx=draw(flag), tie_word_embeddings=draw(flag),
    )  # fmt: skip


def openai_gpt(draw: Any) -> Any:
    return transformers.OpenAIGPTConfig(**_gpt2_sizes(draw), afn=draw(of(["gelu", "relu", "swish"])))


def gpt_neo(draw: Any) -> Any:
    s = heads(draw, kv=False)
    kinds = [draw(of(["global", "local"])) for _ in range(s["L"])]
    return transformers.GPTNeoConfig(
        vocab_size=V, hidden_size=s["N"] * s["H"], num_layers=s["L"], num_heads=s["N"], attention_types=[[kinds, 1]],
        max_position_embeddings=CONTEXT, window_size=draw(of([3, 9])), intermediate_size=draw(of([None, 40])),
    )  # fmt: skip


def gptj(draw: Any) -> Any:
    c = _gpt2_sizes(draw)
    return transformers.GPTJConfig(**c, rotary_dim=draw(of([2, 4])), n_inner=draw(of([None, 40])))


def codegen(draw: Any) -> Any:
    c = _gpt2_sizes(draw) | {"n_head": 4, "n_embd": draw(of([32, 48]))}
    return transformers.CodeGenConfig(**c, n_ctx=CONTEXT, rotary_dim=draw(of([2, 4])), n_inner=draw(of([None, 40])))


def gpt_neox(draw: Any) -> Any:
    s = heads(draw, kv=False)
    return transformers.GPTNeoXConfig(
        vocab_size=V, hidden_size=s["N"] * 16, num_hidden_layers=s["L"], num_attention_heads=s["N"],
        intermediate_size=s["F"], max_position_embeddings=CONTEXT, use_parallel_residual=draw(flag),
        attention_bias=draw(flag), tie_word_embeddings=draw(flag), hidden_act=draw(of(["gelu", "gelu_fast"])),
        rope_parameters=rope(draw) | {"partial_rotary_factor": draw(of([0.25, 0.5, 1.0]))},
    )  # fmt: skip


def opt(draw: Any) -> Any:
    s = heads(draw, kv=False)
    D = s["N"] * s["H"]
    return transformers.OPTConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=s["L"], num_attention_heads=s["N"], ffn_dim=s["F"],
        max_position_embeddings=CONTEXT, do_layer_norm_before=draw(flag), word_embed_proj_dim=draw(of([D, D // 2])),
        enable_bias=draw(flag), layer_norm_elementwise_affine=draw(flag), activation_function=draw(of(["relu", "gelu"])),
    )  # fmt: skip


def bloom(draw: Any) -> Any:
    return transformers.BloomConfig(
        vocab_size=V, hidden_size=24, n_layer=draw(of([1, 2])), n_head=draw(of([4, 6, 12])),
        apply_residual_connection_post_layernorm=draw(flag),
    )  # fmt: skip


def falcon(draw: Any) -> Any:
    s = heads(draw)
    new = draw(flag)
    return transformers.FalconConfig(
        vocab_size=V, hidden_size=s["N"] * s["H"], num_hidden_layers=s["L"], num_attention_heads=s["N"],
        num_kv_heads=s["K"] if new else None, max_position_embeddings=CONTEXT, new_decoder_architecture=new, multi_query=draw(flag),
        parallel_attn=new or draw(flag), num_ln_in_parallel_attn=draw(of([None, 1, 2])) if new else None,
        alibi=draw(flag), bias=draw(flag), tie_word_embeddings=draw(flag), ffn_hidden_size=s["F"],
    )  # fmt: skip


def mpt(draw: Any) -> Any:
    N = draw(of([2, 3, 6]))
    return transformers.MptConfig(
        vocab_size=V, d_model=N * 8, n_layers=draw(of([1, 2])), n_heads=N, max_seq_len=CONTEXT,
        attn_config={"clip_qkv": draw(of([None, 0.5])), "softmax_scale": draw(of([None, 0.3]))},
    )  # fmt: skip


def gpt_bigcode(draw: Any) -> Any:
    return transformers.GPTBigCodeConfig(
        **_gpt2_sizes(draw), multi_query=draw(flag), n_inner=draw(of([None, 40])), scale_attn_weights=draw(flag),
    )  # fmt: skip


def ctrl(draw: Any) -> Any:
    c = _gpt2_sizes(draw)
    c.pop("layer_norm_epsilon")
    return transformers.CTRLConfig(**c, dff=draw(of([20, 33])))


def xglm(draw: Any) -> Any:
    s = heads(draw, kv=False)
    return transformers.XGLMConfig(
        vocab_size=V, d_model=s["N"] * s["H"], num_layers=s["L"], attention_heads=s["N"], ffn_dim=s["F"],
        max_position_embeddings=CONTEXT, scale_embedding=draw(flag), activation_function=draw(of(["gelu", "relu"])),
    )  # fmt: skip


def glm(draw: Any) -> Any:
    c = llama_like(draw, head_dim=draw(of([4, 8])), attention_bias=draw(flag))
    c["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": draw(of([0.5, 1.0]))}
    return transformers.GlmConfig(**c)


DRAWN = {f.__name__: f for f in (
    llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, olmo, olmo2, phi3, phi, starcoder2, gpt2, openai_gpt, gpt_neo,
    gptj, codegen, gpt_neox, opt, bloom, falcon, mpt, gpt_bigcode, ctrl, xglm, glm,
)}  # fmt: skip


def test_every_family_is_drawn():
    kinds = {family.kind for family in FAMILIES}
    assert kinds == {name.replace("openai_gpt", "openai-gpt") for name in DRAWN}


def randomised(config: Any, seed: int) -> Any:
    """A model with noise in every weight, norms and biases too."""
    for key, value in SPECIAL.items():
        setattr(config, key, value)
    architecture = getattr(transformers, BY_KIND[config.model_type].architecture)
    torch.manual_seed(seed)
    return oracle.randomised(architecture._from_config(config, attn_implementation=implementation(config)), seed)


def implementation(config: Any) -> str:
    """Of attention in transformers; Falcon's eager one adds ALiBi twice, to the logits and with the mask."""
    return "sdpa" if config.model_type == "falcon" else "eager"


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_a_random_model_is_read_computed_continued_and_written_as_transformers_does(name, tmp_path_factory):
    @few
    @given(st.data(), st.integers(0, 2**31))
    def check(data: st.DataObject, seed: int) -> None:
        folder = tmp_path_factory.mktemp(name)
        model = randomised(DRAWN[name](data.draw), seed)
        model.save_pretrained(folder / "theirs")
        ours, read = opened(folder / "theirs")
        assert_same_logits(model, ours, seed)
        if not any(rope.scaling and rope.scaling.kind == "longrope" for rope, _ in read.cfg.ropes):
            assert_same_continuations(model, ours, seed)  # transformers begins anew where LongRoPE passes `original`
        assert_same_files(model, read, folder)

    check()


def opened(folder: Any) -> tuple[Any, Any]:
    """Our model of a folder, and the folder."""
    read = open_folder(folder)
    graphdef, shapes, _ = abstract(read.cfg)
    return merge(graphdef, load(read.weights, read.cfg, shapes)), read


def assert_same_logits(model: Any, ours: Any, seed: int) -> None:
    """Documents packed in one row, against transformers' one by one."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, V, n) for n in LENGTHS]
    pad = [0] * (T - sum(LENGTHS))
    row = [
        jnp.asarray(np.concatenate([*part, pad])[None].astype(np.int32))
        for part in (ids, [np.arange(n) for n in LENGTHS], [np.full(n, d + 1) for d, n in enumerate(LENGTHS)])
    ]
    got = np.asarray(jax.jit(lambda m, *row: m(*row))(ours, *row))[0, : sum(LENGTHS)]
    with torch.no_grad():
        wanted = [model(input_ids=torch.tensor(x)[None], use_cache=False).logits[0].float().numpy() for x in ids]
    np.testing.assert_allclose(got, np.concatenate(wanted), atol=1e-4, rtol=0)


def assert_same_continuations(model: Any, ours: Any, seed: int) -> None:
    """A left-padded batch, 16 tokens."""
    rng = np.random.default_rng(seed + 1)
    prompts = [rng.integers(1, V, n).tolist() for n in (3, 8)]
    said = generate(ours, prompts, max_new_tokens=16)
    for prompt, completion in zip(prompts, said, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert list(completion.tokens) == out[0, len(prompt) :].tolist()


def assert_same_files(model: Any, read: Any, folder: Any) -> None:
    """As `oracle.assert_same_tensors`; and what transformers reads says the same."""
    again = oracle.assert_same_tensors(model, read, folder)
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_configs_of_older_transformers_say_the_same(tmp_path):
    new = {"rope_parameters": {"rope_theta": 5e5, **SCALINGS[3]}}
    old = {"rope_theta": 5e5, "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in SCALINGS[3].items()}}
    rest = {
        "model_type": "llama", "vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    read = BY_KIND["llama"].ours
    assert read(rest | new) == read(rest | old) != read(rest)
    assert json.loads(json.dumps(BY_KIND["llama"].theirs(read(rest | new))))["rope_scaling"]["factor"] == 8.0

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import Spelled, random_model, spell

from jaxllm.inference.config import Beam, Greedy
from jaxllm.inference.generate import generate
from jaxllm.models.config import FFN, Attention, Block, DecoderConfig, RMSNorm
from jaxllm.models.module import split

NARROW = DecoderConfig(
    vocab=4, context=32, embed=8, num_layers=2,
    block=Block(attention=Attention(num_heads=2, num_kv_heads=1), ffn=FFN(mlp=8))
)  # fmt: skip
EOS = 2


def exhaustive(model, prompt, count, penalty):
    """Score, tokens and log-probabilities of the best of all sequences of `count` tokens or ended before by EOS."""
    last = list(itertools.product(range(4), repeat=count))
    rows = jnp.array([[*prompt, *tokens] for tokens in last])
    here = jnp.tile(jnp.arange(rows.shape[1]), (len(rows), 1))
    logprobs = jax.nn.log_softmax(jax.jit(type(model).__call__)(model, rows, here, jnp.ones_like(rows)))
    best = (-np.inf, (), ())
    for tokens, logprobs_TV in zip(last, np.asarray(logprobs), strict=True):
        n = tokens.index(EOS) + 1 if EOS in tokens else count
        chosen = [logprobs_TV[len(prompt) - 1 + i, tokens[i]] for i in range(n)]
        best = max(best, (float(sum(chosen)) / n**penalty, tokens[:n], tuple(chosen)))
    return best


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beams_as_many_as_sequences_find_the_best_of_all(penalty):
    ended = 0
    prompts = [[1, 3, 0], [2], [0, 1]]
    for seed in range(4):
        model = random_model(NARROW, seed)
        sampling = Beam(width=4**3, length_penalty=penalty)
        for prompt, got in zip(
            prompts, generate(model, prompts, max_new_tokens=3, sampling=sampling, eos_id=EOS), strict=True
        ):
            _, tokens, logprobs = exhaustive(model, prompt, 3, penalty)
            assert got.tokens == tokens and got.finish == ("eos" if tokens[-1] == EOS else "length")
            np.testing.assert_allclose(got.logprobs, logprobs, atol=1e-4)
            ended += len(tokens) < 3
    assert penalty or ended  # with nothing said of length, some of the best end early


LLAMA = DecoderConfig(
    vocab=40, context=64, embed=16, num_layers=2, tie=False,
    block=Block(norm=RMSNorm(epsilon=1e-6), attention=Attention(num_heads=4, num_kv_heads=2), ffn=FFN(mlp=24)),
)  # fmt: skip


def as_transformers(cfg, params):
    """The same LLaMA in transformers: linear weights there are [out, in], heads in the order of ours."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    a = cfg.block.attention
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.embed, intermediate_size=cfg.block.ffn.mlp,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=a.num_heads, num_key_value_heads=a.kv_heads, rms_norm_eps=cfg.block.norm.epsilon,
        rope_theta=cfg.position.theta, max_position_embeddings=cfg.context, tie_word_embeddings=False,
    ))  # fmt: skip
    names = {
        "self_attn.q_proj": "attention.w_q", "self_attn.k_proj": "attention.w_k", "self_attn.v_proj": "attention.w_v",
        "self_attn.o_proj": "attention.w_o", "mlp.gate_proj": "ffn.w_gate", "mlp.up_proj": "ffn.w_up",
        "mlp.down_proj": "ffn.w_down", "input_layernorm": "norm_attention.scale",
        "post_attention_layernorm": "norm_ffn.scale",
    }  # fmt: skip
    state = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm.scale"],
        "lm_head.weight": params["head"].T,
    }
    for i in range(cfg.num_layers):
        for name, ours in names.items():
            x = np.asarray(params[f"blocks.0.{ours}"][i])
            into = cfg.embed if not name.endswith("o_proj") and "down" not in name else x.size // cfg.embed
            state[f"model.layers.{i}.{name}.weight"] = x if x.ndim == 1 else x.reshape(into, -1).T
    theirs.load_state_dict({name: torch.tensor(np.array(x)) for name, x in state.items()})
    return theirs.eval()


@pytest.mark.parametrize("width, penalty", [(2, 1.0), (5, 0.6)])
def test_beams_end_where_those_of_transformers_do(width, penalty):
    torch = pytest.importorskip("torch")
    model = random_model(LLAMA, 5)
    theirs = as_transformers(LLAMA, split(model)[1])
    prompts = np.random.default_rng(0).integers(3, 40, (4, 6)).tolist()
    ours = generate(model, prompts, max_new_tokens=12, sampling=Beam(width=width, length_penalty=penalty), eos_id=EOS)
    for prompt, got in zip(prompts, ours, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), num_beams=width, length_penalty=penalty,
            early_stopping="never", max_new_tokens=12, eos_token_id=EOS, pad_token_id=0, do_sample=False,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert list(got.tokens) == out.sequences[0, len(prompt) :].tolist()
        score = sum(got.logprobs) / len(got.tokens) ** penalty
        assert score == pytest.approx(float(out.sequences_scores[0]), abs=1e-3)


def test_more_beams_find_what_is_at_least_as_probable_as_greedy():
    model, prompts = random_model(LLAMA, 6), [[5, 6, 7], [9], [1, 2, 3, 4]]
    greedy = generate(model, prompts, max_new_tokens=12, sampling=Greedy())
    beams = generate(model, prompts, max_new_tokens=12, sampling=Beam(width=4, length_penalty=0.0))
    totals = [(sum(b.logprobs), sum(g.logprobs)) for b, g in zip(beams, greedy, strict=True)]
    assert all(b >= g - 1e-4 for b, g in totals) and any(b > g + 0.1 for b, g in totals)


def test_a_row_has_the_beams_it_has_alone_and_ids_stay_known():
    model, prompts = random_model(LLAMA, 7), [[5, 6, 7], [9], [1, 2, 3, 4]]
    ask = lambda prompts: generate(model, prompts, max_new_tokens=12, sampling=Beam(width=3), eos_id=EOS, vocab_size=25)
    together = ask(prompts)
    assert [c.tokens for c in together] == [ask([prompt])[0].tokens for prompt in prompts]
    assert max(max(c.tokens) for c in together) < 25


def test_a_stop_text_cuts_what_the_search_found():
    model = random_model(DecoderConfig(**{**dict(NARROW), "vocab": 29}), 8)
    ask = lambda **kw: generate(model, [[5, 6]], max_new_tokens=10, sampling=Beam(width=3), stream=Spelled, **kw)[0]
    free = ask()
    stop, shown = free.text[3:6], []
    cut = ask(stop=(stop,), show=lambda row, piece: shown.append(piece))
    assert cut.text == free.text[: free.text.index(stop)] == "".join(shown) and cut.finish == "stop"
    assert spell(free.tokens) == free.text and cut.tokens == free.tokens[: len(cut.tokens)]

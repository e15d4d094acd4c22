"""Random models of Hugging Face transformers, their weights in our decoder: the same logits.

The documents go through transformers one by one and through ours packed in one row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.config import DecoderConfig
from jaxllm.models.layout import stack
from jaxllm.models.module import abstract, merge

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.interop.oracle import randomised  # noqa: E402

LENGTHS, T, V = (7, 1, 12), 24, 61
GELU = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def assert_same_logits(model, cfg: DecoderConfig, logical: dict[str, np.ndarray]) -> None:
    graphdef, shapes, _ = abstract(cfg)
    params = stack({n: np.ascontiguousarray(x, np.float32) for n, x in logical.items()}, cfg)
    assert {n: x.shape for n, x in params.items()} == {n: x.shape for n, x in shapes.items()}
    ids = [np.random.default_rng(n).integers(0, V, n) for n in LENGTHS]
    pad = [0] * (T - sum(LENGTHS))
    row = [np.concatenate([*part, pad])[None].astype(np.int32) for part in (
        ids, [np.arange(n) for n in LENGTHS], [np.full(n, d + 1) for d, n in enumerate(LENGTHS)]
    )]  # fmt: skip
    ours = jax.jit(lambda p, *row: merge(graphdef, p)(*row))({n: jnp.asarray(x) for n, x in params.items()}, *row)[0]
    with torch.no_grad():
        peer = [model(input_ids=torch.tensor(x)[None], use_cache=False).logits[0].numpy() for x in ids]
    np.testing.assert_allclose(ours[: sum(LENGTHS)], np.concatenate(peer), atol=1e-4, rtol=0)


def weights(model):
    state = {n: p.detach().numpy() for n, p in model.state_dict().items()}
    return lambda name: state[name]


def heads(w, n):
    """[heads x head_dim, D] as torch keeps it -> [D, heads, head_dim]."""
    return w.T.reshape(w.shape[1], n, -1)


def out(w, n):
    """[D, heads x head_dim] -> [heads, head_dim, D]."""
    return w.T.reshape(n, -1, w.shape[0])


def named(prefix: str, **parts) -> dict:
    """Weights of one layer; `__` stands for a dot."""
    return {prefix + n.replace("__", "."): x for n, x in parts.items()}


@pytest.mark.parametrize("seed", range(6))
def test_llama(seed):
    pick = np.random.default_rng(seed).choice
    N, H = int(pick([2, 4])), int(pick([4, 6, 8]))
    K = int(pick([1, 2, N]))
    D, F, L = N * int(pick([6, 8])), int(pick([20, 33])), int(pick([1, 2, 3]))
    tie, bias, theta, eps = (
        bool(seed % 2),
        bool(pick(2)),
        float(pick([100, 10_000, 500_000])),
        float(pick([1e-6, 1e-3])),
    )
    act = "silu" if seed < 4 else str(pick(["gelu", "relu", "gelu_new"]))
    model = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
        num_key_value_heads=K, head_dim=H, hidden_act=act, max_position_embeddings=64, rms_norm_eps=eps,
        tie_word_embeddings=tie, rope_parameters={"rope_type": "default", "rope_theta": theta},
        attention_bias=bias, mlp_bias=bias,
    )), seed)  # fmt: skip
    cfg = DecoderConfig.model_validate({
        "vocab": V, "context": 64, "embed": D, "num_layers": L, "tie": tie,
        "position": {"kind": "rope", "theta": theta},
        "block": {
            "norm": {"kind": "rmsnorm", "epsilon": eps}, "ffn": {"mlp": F, "activation": GELU[act], "bias": bias},
            "attention": {"num_heads": N, "num_kv_heads": K, "head_dim": H, "bias": bias, "out_bias": bias},
        },
    })  # fmt: skip
    w = weights(model)
    logical = {"embedding": w("model.embed_tokens.weight"), "final_norm.scale": w("model.norm.weight")}
    if not tie:
        logical["head"] = w("lm_head.weight").T
    for i in range(L):
        p, to = f"model.layers.{i}.", f"layers.{i}."
        logical |= named(
            to,
            attention__w_q=heads(w(p + "self_attn.q_proj.weight"), N),
            attention__w_k=heads(w(p + "self_attn.k_proj.weight"), K),
            attention__w_v=heads(w(p + "self_attn.v_proj.weight"), K),
            attention__w_o=out(w(p + "self_attn.o_proj.weight"), N),
            ffn__w_gate=w(p + "mlp.gate_proj.weight").T,
            ffn__w_up=w(p + "mlp.up_proj.weight").T,
            ffn__w_down=w(p + "mlp.down_proj.weight").T,
            norm_attention__scale=w(p + "input_layernorm.weight"),
            norm_ffn__scale=w(p + "post_attention_layernorm.weight"),
        )
        if bias:
            logical |= named(
                to,
                attention__b_q=w(p + "self_attn.q_proj.bias").reshape(N, -1),
                attention__b_k=w(p + "self_attn.k_proj.bias").reshape(K, -1),
                attention__b_v=w(p + "self_attn.v_proj.bias").reshape(K, -1),
                attention__b_o=w(p + "self_attn.o_proj.bias"),
                ffn__b_gate=w(p + "mlp.gate_proj.bias"),
                ffn__b_up=w(p + "mlp.up_proj.bias"),
                ffn__b_down=w(p + "mlp.down_proj.bias"),
            )
    assert_same_logits(model, cfg, logical)


def layer_norms(w, **names: str) -> dict:
    return {
        f"{ours}.{part}": w(f"{theirs}.{end}")
        for ours, theirs in names.items()
        for part, end in (("scale", "weight"), ("bias", "bias"))
    }


def plain_ffn(w, up: str, down: str, transpose: bool = True) -> dict:
    turn = np.transpose if transpose else np.asarray
    return {
        "ffn.w_up": turn(w(up + ".weight")),
        "ffn.b_up": w(up + ".bias"),
        "ffn.w_down": turn(w(down + ".weight")),
        "ffn.b_down": w(down + ".bias"),
    }


def fused(w, name: str, n: int) -> dict:
    """Query, key and value of each head beside each other (GPT-NeoX, BLOOM)."""
    weight, bias = w(name + ".weight"), w(name + ".bias")
    D = weight.shape[1]
    weight, bias = weight.reshape(n, 3, -1, D), bias.reshape(n, 3, -1)
    return {f"attention.w_{x}": weight[:, i].transpose(2, 0, 1) for i, x in enumerate("qkv")} | {
        f"attention.b_{x}": bias[:, i] for i, x in enumerate("qkv")
    }


def layered(L: int, layer) -> dict:
    return {f"layers.{i}.{name}": x for i in range(L) for name, x in layer(i).items()}


@pytest.mark.parametrize("seed", range(6))
def test_gpt2(seed):
    pick = np.random.default_rng(seed).choice
    N, L, F = int(pick([1, 2, 4])), int(pick([1, 2, 3])), int(pick([20, 33]))
    D = N * int(pick([4, 6, 7]))
    tie, eps, act = bool(seed % 2), float(pick([1e-5, 1e-3])), str(pick(["gelu_new", "gelu", "relu"]))
    model = randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=32, n_embd=D, n_layer=L, n_head=N, n_inner=F, activation_function=act,
        layer_norm_epsilon=eps, tie_word_embeddings=tie,
    )), seed)  # fmt: skip
    cfg = DecoderConfig.model_validate({
        "vocab": V, "context": 32, "embed": D, "num_layers": L, "tie": tie, "position": "learned",
        "block": {
            "norm": {"kind": "layernorm", "epsilon": eps},
            "ffn": {"mlp": F, "activation": GELU[act], "glu": False, "bias": True},
            "attention": {"num_heads": N, "bias": True, "out_bias": True},
        },
    })  # fmt: skip
    w = weights(model)

    def layer(i):
        p = f"transformer.h.{i}."
        qkv, bias = np.split(w(p + "attn.c_attn.weight"), 3, -1), np.split(w(p + "attn.c_attn.bias"), 3)
        return (
            {f"attention.w_{x}": qkv[j].reshape(D, N, -1) for j, x in enumerate("qkv")}
            | {f"attention.b_{x}": bias[j].reshape(N, -1) for j, x in enumerate("qkv")}
            | {
                "attention.w_o": w(p + "attn.c_proj.weight").reshape(N, -1, D),
                "attention.b_o": w(p + "attn.c_proj.bias"),
            }
            | plain_ffn(w, p + "mlp.c_fc", p + "mlp.c_proj", transpose=False)
            | layer_norms(w, norm_attention=p + "ln_1", norm_ffn=p + "ln_2")
        )

    logical = {"embedding": w("transformer.wte.weight"), "positions": w("transformer.wpe.weight")}
    logical |= {} if tie else {"head": w("lm_head.weight").T}
    assert_same_logits(model, cfg, logical | layer_norms(w, final_norm="transformer.ln_f") | layered(L, layer))


@pytest.mark.parametrize(("seed", "fraction", "norms"), [(0, 0.25, 2), (1, 1.0, 2), (2, 0.5, None)])
def test_gpt_neox(seed, fraction, norms):
    N, H, F, L = 2, 16, 40, 2
    model = randomised(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=V, hidden_size=N * H, num_hidden_layers=L, num_attention_heads=N, intermediate_size=F,
        max_position_embeddings=64, use_parallel_residual=norms is not None, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": fraction},
    )), seed)  # fmt: skip
    cfg = DecoderConfig.model_validate({
        "vocab": V, "context": 64, "embed": N * H, "num_layers": L, "position": {"kind": "rope", "fraction": fraction},
        "block": {
            "norm": "layernorm", "placement": {"kind": "parallel", "norms": norms} if norms else "pre",
            "ffn": {"mlp": F, "activation": "gelu", "glu": False, "bias": True},
            "attention": {"num_heads": N, "bias": True, "out_bias": True},
        },
    })  # fmt: skip
    w = weights(model)

    def layer(i):
        p = f"gpt_neox.layers.{i}."
        return (
            fused(w, p + "attention.query_key_value", N)
            | plain_ffn(w, p + "mlp.dense_h_to_4h", p + "mlp.dense_4h_to_h")
            | {"attention.w_o": out(w(p + "attention.dense.weight"), N), "attention.b_o": w(p + "attention.dense.bias")}
            | layer_norms(w, norm_attention=p + "input_layernorm", norm_ffn=p + "post_attention_layernorm")
        )  # fmt: skip

    logical = {"embedding": w("gpt_neox.embed_in.weight"), "head": w("lm_head.weight").T}
    assert_same_logits(model, cfg, logical | layer_norms(w, final_norm="gpt_neox.final_layer_norm") | layered(L, layer))


@pytest.mark.parametrize(("seed", "num_heads"), [(0, 4), (1, 6)])
def test_bloom(seed, num_heads):
    N, D, L = num_heads, 24, 2
    model = randomised(transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=V, hidden_size=D, n_layer=L, n_head=N)
    ), seed)  # fmt: skip
    cfg = DecoderConfig.model_validate({
        "vocab": V, "context": 64, "embed": D, "num_layers": L, "position": "alibi", "tie": True,
        "embedding_norm": "layernorm",
        "block": {
            "norm": "layernorm", "ffn": {"mlp": 4 * D, "activation": "gelu_tanh", "glu": False, "bias": True},
            "attention": {"num_heads": N, "bias": True, "out_bias": True},
        },
    })  # fmt: skip
    w = weights(model)

    def layer(i):
        p = f"transformer.h.{i}."
        return (
            fused(w, p + "self_attention.query_key_value", N)
            | plain_ffn(w, p + "mlp.dense_h_to_4h", p + "mlp.dense_4h_to_h")
            | {"attention.w_o": out(w(p + "self_attention.dense.weight"), N),
               "attention.b_o": w(p + "self_attention.dense.bias")}
            | layer_norms(w, norm_attention=p + "input_layernorm", norm_ffn=p + "post_attention_layernorm")
        )  # fmt: skip

    logical = {"embedding": w("transformer.word_embeddings.weight")} | layered(L, layer)
    norms = layer_norms(w, embedding_norm="transformer.word_embeddings_layernorm", final_norm="transformer.ln_f")
    assert_same_logits(model, cfg, logical | norms)


@pytest.mark.parametrize(("seed", "rotary_dim"), [(0, 4), (1, 8)])
def test_gptj(seed, rotary_dim):
    N, H, F, L = 3, 8, 40, 2
    model = randomised(transformers.GPTJForCausalLM(transformers.GPTJConfig(
        vocab_size=V, n_positions=64, n_embd=N * H, n_layer=L, n_head=N, rotary_dim=rotary_dim, n_inner=F
    )), seed)  # fmt: skip
    cfg = DecoderConfig.model_validate({
        "vocab": V, "context": 64, "embed": N * H, "num_layers": L, "head_bias": True,
        "position": {"kind": "rope", "fraction": rotary_dim / H, "interleaved": True},
        "block": {
            "norm": "layernorm", "placement": "parallel", "attention": {"num_heads": N},
            "ffn": {"mlp": F, "activation": "gelu_tanh", "glu": False, "bias": True},
        },
    })  # fmt: skip
    w = weights(model)

    def layer(i):
        p = f"transformer.h.{i}."
        return (
            {f"attention.w_{x}": heads(w(f"{p}attn.{x}_proj.weight"), N) for x in "qkv"}
            | {"attention.w_o": out(w(p + "attn.out_proj.weight"), N)}
            | plain_ffn(w, p + "mlp.fc_in", p + "mlp.fc_out") | layer_norms(w, norm_attention=p + "ln_1")
        )  # fmt: skip

    logical = {"embedding": w("transformer.wte.weight"), "head": w("lm_head.weight").T, "head_bias": w("lm_head.bias")}
    assert_same_logits(model, cfg, logical | layer_norms(w, final_norm="transformer.ln_f") | layered(L, layer))


@pytest.mark.parametrize(("seed", "num_layers"), [(0, 2), (1, 3)])
def test_gemma2(seed, num_layers):
    N, K, H, D, F, L = 4, 2, 6, 16, 24, num_layers
    model = randomised(transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
        num_key_value_heads=K, head_dim=H, max_position_embeddings=64, query_pre_attn_scalar=10, sliding_window=4,
        final_logit_softcapping=3.0, attn_logit_softcapping=2.0, attn_implementation="eager",
    )), seed)  # fmt: skip
    cfg = DecoderConfig.model_validate({
        "vocab": V, "context": 64, "embed": D, "num_layers": L, "tie": True,
        "embed_scale": D**0.5, "logit_softcap": 3.0,
        "block": {
            "norm": {"kind": "rmsnorm", "unit_offset": True}, "placement": "sandwich",
            "ffn": {"mlp": F, "activation": "gelu_tanh"},
            "attention": {"num_heads": N, "num_kv_heads": K, "head_dim": H, "softcap": 2.0, "scale": 10**-0.5},
        },
        "pattern": [{"attention": {"window": 4}}, {}],
    })  # fmt: skip
    w = weights(model)

    def layer(i):
        p = f"model.layers.{i}."
        norms = {
            "norm_attention": "input_layernorm", "post_attention": "post_attention_layernorm",
            "norm_ffn": "pre_feedforward_layernorm", "post_ffn": "post_feedforward_layernorm",
        }  # fmt: skip
        return (
            {f"attention.w_{x}": heads(w(f"{p}self_attn.{x}_proj.weight"), n)
               for x, n in zip("qkv", (N, K, K), strict=True)}
            | {"attention.w_o": out(w(p + "self_attn.o_proj.weight"), N)}
            | {f"ffn.w_{x}": w(f"{p}mlp.{x}_proj.weight").T for x in ("gate", "up", "down")}
            | {f"{ours}.scale": w(f"{p}{theirs}.weight") for ours, theirs in norms.items()}
        )  # fmt: skip

    logical = {"embedding": w("model.embed_tokens.weight"), "final_norm.scale": w("model.norm.weight")}
    assert_same_logits(model, cfg, logical | layered(L, layer))

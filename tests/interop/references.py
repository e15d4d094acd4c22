"""Decoders in plain numpy, slow and one document at a time, written from papers and the models' published code.

Nothing here knows of jaxllm. A function takes the tensors of a checkpoint by their own names, the keys of its
config.json and token ids [T], and gives logits [T, V] in float64. T tokens, N heads, K key heads, H size of a head.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Tensors = Mapping[str, Array]
Config = Mapping[str, Any]

# --- what they are made of -----------------------------------------------------------------------------------------


def linear(t: Tensors, name: str, x: Array) -> Array:
    """torch's Linear; the bias if there is one."""
    y = x @ t[f"{name}.weight"].T.astype(np.float64)
    return y + t[f"{name}.bias"] if f"{name}.bias" in t else y


def rms_norm(t: Tensors, name: str, x: Array, epsilon: float) -> Array:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * t[f"{name}.weight"]


def layer_norm(t: Tensors, name: str, x: Array, epsilon: float) -> Array:
    mean = x.mean(-1, keepdims=True)
    y = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + epsilon)
    return y * t[f"{name}.weight"] + t[f"{name}.bias"]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x_TNH: Array, positions: Any, *, size: int | None = None, base: float = 1e4, pairs: bool = False) -> Array:
    """RoPE of the first `size` elements of each head: halves against each other, or neighbours (`pairs`)."""
    size = x_TNH.shape[-1] if size is None else size
    out = x_TNH.astype(np.float64).copy()
    for t, position in enumerate(positions):
        for i in range(size // 2):
            angle = position / base ** (2 * i / size)
            a, b = (2 * i, 2 * i + 1) if pairs else (i, i + size // 2)
            x, y = x_TNH[t, :, a], x_TNH[t, :, b]
            out[t, :, a] = x * math.cos(angle) - y * math.sin(angle)
            out[t, :, b] = y * math.cos(angle) + x * math.sin(angle)
    return out


def slopes(heads: int) -> list[float]:
    """ALiBi's (Press et al. 2021, section 3, and the rule of its code for heads that are no power of two)."""
    lower = 2 ** math.floor(math.log2(heads))
    own = [2.0 ** (-8 * (i + 1) / lower) for i in range(lower)]
    return own if lower == heads else own + slopes(2 * lower)[::2][: heads - lower]


def attend(
    q_TNH: Array, k_TKH: Array, v_TKH: Array, *, prefix: int = 0, alibi: list[float] | None = None,
    scale: float | None = None,
) -> Array:  # fmt: skip
    """Causal attention, all seeing the first `prefix` tokens too; heads side by side in the result [T, N H]."""
    T, N, H = q_TNH.shape
    group = N // k_TKH.shape[1]
    out = np.zeros((T, N, H))
    for t in range(T):
        seen = max(t + 1, prefix)
        for n in range(N):
            k, v = k_TKH[:seen, n // group], v_TKH[:seen, n // group]
            logits = k @ q_TNH[t, n] * (H**-0.5 if scale is None else scale)
            if alibi is not None:
                logits = logits - alibi[n] * np.arange(t, t - seen, -1)
            out[t, n] = softmax(logits) @ v
    return out.reshape(T, N * H)


def heads(x: Array, count: int) -> Array:
    return x.reshape(len(x), count, -1)


def in_turn(x: Array, count: int) -> tuple[Array, Array, Array]:
    """q, k and v of a matrix that has them head by head."""
    x_TN3H = x.reshape(len(x), count, 3, -1)
    return x_TN3H[:, :, 0], x_TN3H[:, :, 1], x_TN3H[:, :, 2]


def gated(t: Tensors, name: str, x: Array) -> Array:
    return linear(t, f"{name}.down_proj", silu(linear(t, f"{name}.gate_proj", x)) * linear(t, f"{name}.up_proj", x))


# --- the models ----------------------------------------------------------------------------------------------------


def llama(
    t: Tensors, c: Config, ids: Array, *, base: float = 1e4,
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
) -> Array:  # fmt: skip
    """LLaMA; so are Aquila, Yi but for the names of its norms, and InternLM with biases."""
    N, K = c["num_attention_heads"], c.get("num_key_value_heads", c["num_attention_heads"])
    x, at = t["model.embed_tokens.weight"][ids].astype(np.float64), range(len(ids))
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        h = rms_norm(t, f"{p}.{norms[0]}", x, c["rms_norm_eps"])
        q = rotate(heads(linear(t, f"{p}.self_attn.q_proj", h), N), at, base=base)
        k = rotate(heads(linear(t, f"{p}.self_attn.k_proj", h), K), at, base=base)
        v = heads(linear(t, f"{p}.self_attn.v_proj", h), K)
        x = x + linear(t, f"{p}.self_attn.o_proj", attend(q, k, v))
        x = x + gated(t, f"{p}.mlp", rms_norm(t, f"{p}.{norms[1]}", x, c["rms_norm_eps"]))
    return linear(t, "lm_head", rms_norm(t, "model.norm", x, c["rms_norm_eps"]))


def yi(t: Tensors, c: Config, ids: Array) -> Array:
    return llama(t, c, ids, base=c["rope_theta"], norms=("ln1", "ln2"))


def internlm(t: Tensors, c: Config, ids: Array) -> Array:
    rotary, H, T = c["rotary"], c["hidden_size"] // c["num_attention_heads"], len(ids)
    base = rotary["base"]
    if rotary["type"] == "dynamic" and T > c["max_position_embeddings"]:
        factor = rotary["scaling_factor"]
        base *= (factor * T / c["max_position_embeddings"] - (factor - 1)) ** (H / (H - 2))
    return llama(t, c, ids, base=base)


def baichuan(t: Tensors, c: Config, ids: Array) -> Array:
    N, at = c["num_attention_heads"], range(len(ids))
    rotates = "max_position_embeddings" in c
    x = t["model.embed_tokens.weight"][ids].astype(np.float64)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        h = rms_norm(t, f"{p}.input_layernorm", x, c["rms_norm_eps"])
        q, k, v = (heads(part, N) for part in np.split(linear(t, f"{p}.self_attn.W_pack", h), 3, -1))
        if rotates:
            o = attend(rotate(q, at), rotate(k, at), v)
        else:
            o = attend(q, k, v, alibi=slopes(N))
        x = x + linear(t, f"{p}.self_attn.o_proj", o)
        x = x + gated(t, f"{p}.mlp", rms_norm(t, f"{p}.post_attention_layernorm", x, c["rms_norm_eps"]))
    x = rms_norm(t, "model.norm", x, c["rms_norm_eps"])
    head = t["lm_head.weight"].astype(np.float64)
    if "z_loss_weight" in c:
        head = head / np.sqrt((head**2).sum(-1, keepdims=True))
    return x @ head.T


def qwen(t: Tensors, c: Config, ids: Array) -> Array:
    N, H, T = c["num_attention_heads"], c["kv_channels"], len(ids)
    n, size = c["seq_length"], int(H * c["rotary_pct"])
    base, by = float(c["rotary_emb_base"]), np.ones(T)
    if c["use_dynamic_ntk"] and T > n:
        base *= (2 ** math.ceil(math.log2(T / n) + 1) - 1) ** (size / (size - 2))
    if c["use_logn_attn"]:
        by = np.array([math.log(i, n) if i > n else 1.0 for i in range(1, T + 1)])
    x = t["transformer.wte.weight"][ids].astype(np.float64)
    for i in range(c["num_hidden_layers"]):
        p = f"transformer.h.{i}"
        h = rms_norm(t, f"{p}.ln_1", x, c["layer_norm_epsilon"])
        q, k, v = (heads(part, N) for part in np.split(linear(t, f"{p}.attn.c_attn", h), 3, -1))
        q, k = (rotate(y, range(T), size=size, base=base) for y in (q, k))
        x = x + linear(t, f"{p}.attn.c_proj", attend(q * by[:, None, None], k, v))
        h = rms_norm(t, f"{p}.ln_2", x, c["layer_norm_epsilon"])
        x = x + linear(t, f"{p}.mlp.c_proj", linear(t, f"{p}.mlp.w1", h) * silu(linear(t, f"{p}.mlp.w2", h)))
    return linear(t, "lm_head", rms_norm(t, "transformer.ln_f", x, c["layer_norm_epsilon"]))


def moss(t: Tensors, c: Config, ids: Array) -> Array:
    """CodeGen's layout: four shares, each with its heads' queries, values, keys; attention and MLP side by side."""
    N, D, T = c["n_head"], c["n_embd"], len(ids)
    x = t["transformer.wte.weight"][ids].astype(np.float64)
    for i in range(c["n_layer"]):
        p = f"transformer.h.{i}"
        h = layer_norm(t, f"{p}.ln_1", x, c["layer_norm_epsilon"])
        shares = np.split(linear(t, f"{p}.attn.qkv_proj", h), 4, -1)
        q, v, k = (
            heads(np.concatenate([share[:, j * D // 4 : (j + 1) * D // 4] for share in shares], -1), N)
            for j in range(3)
        )
        q, k = (rotate(y, range(T), size=c["rotary_dim"], pairs=True) for y in (q, k))
        up = gelu_tanh(linear(t, f"{p}.mlp.fc_in", h))
        x = x + linear(t, f"{p}.attn.out_proj", attend(q, k, v)) + linear(t, f"{p}.mlp.fc_out", up)
    return linear(t, "lm_head", layer_norm(t, "transformer.ln_f", x, c["layer_norm_epsilon"]))


def chatglm2(t: Tensors, c: Config, ids: Array) -> Array:
    N, H, at = c["num_attention_heads"], c["kv_channels"], np.arange(len(ids))
    norm = rms_norm if c["rmsnorm"] else layer_norm
    ratio = c.get("rope_ratio", 1)
    divides = "chatglm2" in c.get("_name_or_path", "")
    base = 1e4 if divides else 1e4 * ratio
    at = at / ratio if divides else at
    x = t["transformer.embedding.word_embeddings.weight"][ids].astype(np.float64)
    for i in range(c["num_layers"]):
        p = f"transformer.encoder.layers.{i}"
        h = norm(t, f"{p}.input_layernorm", x, c["layernorm_epsilon"])
        qkv = linear(t, f"{p}.self_attention.query_key_value", h)
        if c["multi_query_attention"]:
            K = c["multi_query_group_num"]
            q, k, v = np.split(qkv, [N * H, (N + K) * H], -1)
            q, k, v = heads(q, N), heads(k, K), heads(v, K)
        else:
            q, k, v = in_turn(qkv, N)
        q, k = (rotate(y, at, size=H // 2, base=base, pairs=True) for y in (q, k))
        after = c["apply_residual_connection_post_layernorm"]
        x = (h if after else x) + linear(t, f"{p}.self_attention.dense", attend(q, k, v))
        h = norm(t, f"{p}.post_attention_layernorm", x, c["layernorm_epsilon"])
        gate, up = np.split(linear(t, f"{p}.mlp.dense_h_to_4h", h), 2, -1)
        x = (h if after else x) + linear(t, f"{p}.mlp.dense_4h_to_h", silu(gate) * up)
    if c["post_layer_norm"]:
        x = norm(t, "transformer.encoder.final_layernorm", x, c["layernorm_epsilon"])
    return linear(t, "transformer.output_layer", x)


def sat(
    t: Tensors, c: Config, ids: Array, prefix: int, turn: Callable[[Array], Array], ffn: Callable[[Array], Array]
) -> Array:
    """GLM's layers as SwissArmyTransformer has them; tokens see all of the prefix."""
    N, alpha, epsilon = c["num_attention_heads"], math.sqrt(2 * c["num_layers"]), c["layernorm_epsilon"]
    x = t["transformer.word_embeddings.weight"][ids].astype(np.float64)
    for i in range(c["num_layers"]):
        p = f"transformer.layers.{i}"
        h = layer_norm(t, f"{p}.input_layernorm", x, epsilon)
        q, k, v = in_turn(linear(t, f"{p}.attention.query_key_value", h), N)
        x = alpha * h + linear(t, f"{p}.attention.dense", attend(turn(q), turn(k), v, prefix=prefix))
        h = layer_norm(t, f"{p}.post_attention_layernorm", x, epsilon)
        x = alpha * h + linear(t, f"{p}.mlp.dense_4h_to_h", ffn(linear(t, f"{p}.mlp.dense_h_to_4h", h)))
    x = layer_norm(t, "transformer.final_layernorm", x, epsilon)
    return x @ t["transformer.word_embeddings.weight"].T.astype(np.float64)


def glm130b(t: Tensors, c: Config, ids: Array, prefix: int = 0) -> Array:
    def geglu(y: Array) -> Array:
        a, b = np.split(y, 2, -1)
        return a * gelu(b)

    return sat(t, c, ids, prefix, lambda y: rotate(y, range(len(ids))), geglu)


def chatglm(t: Tensors, c: Config, ids: Array, prefix: int, mask: int | None = None) -> Array:
    """ChatGLM-6B: the same with two places for each token, and no gate.

    The first place counts tokens of the prompt and stays at its mask (its last token, [gMASK]), the second counts what
    follows.
    """
    first = [i if i < prefix else prefix - 1 if mask is None else mask for i in range(len(ids))]
    second = [max(0, i - prefix + 1) for i in range(len(ids))]

    def turn(y: Array) -> Array:
        H = y.shape[-1]
        return np.concatenate([rotate(y[..., : H // 2], first), rotate(y[..., H // 2 :], second)], -1)

    return sat(t, c, ids, prefix, turn, gelu_tanh)


def query_layered(
    t: Tensors, ids: Array, N: int, L: int, epsilon: float, act: Callable[[Array], Array], names: Mapping[str, str]
) -> Array:
    """GPT-2 with one more layer on top of the last norm, whose queries are embeddings of places.

    PanGu-alpha (Zeng et al. 2021, arXiv:2104.12369, section 3.2); CodeGeeX (Zheng et al. 2023, arXiv:2303.17568).
    """
    word = t[f"{names['word']}.weight"].astype(np.float64)

    def layer(p: str, x: Array, queries: Array | None) -> Array:
        h = layer_norm(t, f"{p}.{names['norm1']}", x, epsilon)
        q = linear(t, f"{p}.{names['q']}", h if queries is None else queries)
        o = attend(heads(q, N), *(heads(linear(t, f"{p}.{names[n]}", h), N) for n in "kv"))
        x = x + linear(t, f"{p}.{names['o']}", o)
        h = layer_norm(t, f"{p}.{names['norm2']}", x, epsilon)
        return x + linear(t, f"{p}.{names['down']}", act(linear(t, f"{p}.{names['up']}", h)))

    x = word[ids] + t[f"{names['places']}.weight"][: len(ids)]
    for i in range(L):
        x = layer(names["layer"].format(i), x, None)
    x = layer_norm(t, names["norm"], x, epsilon)
    queries = t[f"{names['queries']}.weight"][: len(ids)].astype(np.float64)
    return layer(names["top"].format(L), x, queries) @ word.T


def codegeex(t: Tensors, c: Config, ids: Array) -> Array:
    def fast_gelu(x: Array) -> Array:
        """As CodeGeeX writes it; MindSpore's."""
        return x / (1 + np.exp(-1.702 * np.abs(x))) * np.exp(0.851 * (x - np.abs(x)))

    names = {
        "word": "language_model.embedding.word_embeddings", "places": "language_model.embedding.position_embeddings",
        "queries": "language_model.topQueryEmbedding.top_query_embeddings",
        "layer": "language_model.transformer.layers.{}", "top": "language_model.transformer.topQueryLayer", "norm": "language_model.transformer.final_layernorm",
        "q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.dense",
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }  # fmt: skip
    return query_layered(t, ids, c["num_attention_heads"], c["num_layers"], 1e-5, fast_gelu, names)


def pangu(t: Tensors, c: Config, ids: Array) -> Array:
    """The query layer is the last of `num_layers`."""
    names = {
        "word": "transformer.wte", "places": "transformer.wpe", "queries": "transformer.wqe",
        "layer": "transformer.h.{}", "top": "transformer.h.{}", "norm": "transformer.ln_f", "q": "attn.q_proj", "k": "attn.k_proj",
        "v": "attn.v_proj", "o": "attn.c_proj", "norm1": "ln_1", "norm2": "ln_2", "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }  # fmt: skip
    return query_layered(t, ids, c["num_heads"], c["num_layers"] - 1, c["layer_norm_epsilon"], gelu, names)


def megatron(t: Tensors, c: Config, ids: Array) -> Array:
    N, version = c["num_attention_heads"], c.get("checkpoint_version", 0)
    stack, attention = ("encoder", "self_attention") if version == 3 else ("transformer", "attention")
    act = gelu_tanh if c["openai_gelu"] or c["bias_gelu_fusion"] else gelu
    p = "language_model.embedding"
    word = t[f"{p}.word_embeddings.weight"].astype(np.float64)
    x = word[ids] + t[f"{p}.position_embeddings.weight"][: len(ids)]
    for i in range(c["num_layers"]):
        p = f"language_model.{stack}.layers.{i}"
        h = layer_norm(t, f"{p}.input_layernorm", x, c["layernorm_epsilon"])
        qkv = linear(t, f"{p}.{attention}.query_key_value", h)
        if version >= 2:
            q, k, v = in_turn(qkv, N)
        elif version == 1:
            y = qkv.reshape(len(ids), N, -1, 3)
            q, k, v = y[..., 0], y[..., 1], y[..., 2]
        else:
            q, k, v = (heads(part, N) for part in np.split(qkv, 3, -1))
        x = x + linear(t, f"{p}.{attention}.dense", attend(q, k, v))
        h = layer_norm(t, f"{p}.post_attention_layernorm", x, c["layernorm_epsilon"])
        x = x + linear(t, f"{p}.mlp.dense_4h_to_h", act(linear(t, f"{p}.mlp.dense_h_to_4h", h)))
    return layer_norm(t, f"language_model.{stack}.final_layernorm", x, c["layernorm_epsilon"]) @ word.T


def palm(t: Tensors, ids: Array, layers: int, epsilon: float) -> Array:
    """PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 2): y = x + MLP(LN(x)) + Attention(LN(x)), no biases.

    One key and value head; SwiGLU; RoPE; embeddings shared with the head, whose logits are divided by the root of the
    width (section 5). There are no public weights, so matrices are named by what they are and [in, out].
    """
    x = t["embedding"][ids].astype(np.float64)

    def norm(name: str, x: Array) -> Array:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * t[name]

    for i in range(layers):
        h = norm(f"{i}.norm", x)
        q, k, v = (np.einsum("td,dnh->tnh", h, t[f"{i}.{name}"]) for name in "qkv")
        q, k = (rotate(y, range(len(ids))) for y in (q, k))
        o = attend(q, k, v) @ t[f"{i}.o"].reshape(-1, x.shape[-1])
        x = x + o + (silu(h @ t[f"{i}.gate"]) * (h @ t[f"{i}.up"])) @ t[f"{i}.down"]
    return norm("norm", x) @ t["embedding"].T / math.sqrt(x.shape[-1])

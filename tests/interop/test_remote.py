"""Families that transformers has no class for, against plain numpy: the same logits, continuations, files."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.inference.generate import generate
from jaxllm.interop import remote
from jaxllm.interop.family import differences, resolved
from jaxllm.interop.folder import BY_KIND, family_of, fitting, open_folder, save_folder
from jaxllm.interop.weights import load
from jaxllm.models.config import DecoderConfig
from jaxllm.models.count import parameters
from jaxllm.models.layout import unstack
from jaxllm.models.module import abstract, merge
from tests.interop import references

V, CONTEXT = 61, 64
LENGTHS, T = (7, 1, 12), 24
few = functools.partial(settings, deadline=None, derandomize=True, database=None, phases=[Phase.generate])

Shapes = dict[str, tuple[int, ...]]
Pick = Callable[[Sequence[Any]], Any]  # one of several
FLAG = (False, True)


class Case(NamedTuple):
    """How a family's models are made and what they compute."""

    config: Callable[[Pick], dict[str, Any]]
    shapes: Callable[[dict[str, Any]], Shapes]  # of the tensors by their names
    logits: Callable[..., np.ndarray]  # of tokens, by tensors, config, ids
    prefix: bool = False  # the reference takes the length of a prefix


def sizes(pick: Pick, *, groups: bool = False) -> dict[str, int]:
    N, H = pick([2, 3, 4]), pick([4, 8])
    K = pick([k for k in (1, 2, 3, 4) if N % k == 0]) if groups else N
    return {"N": N, "K": K, "H": H, "D": N * H, "L": pick([1, 2, 3]), "F": pick([20, 33])}


def llama_keys(pick: Pick, kind: str, architecture: str, **more: Any) -> dict[str, Any]:
    s = sizes(pick, groups="num_key_value_heads" in more)
    return {
        "architectures": [architecture], "model_type": kind, "vocab_size": V, "hidden_size": s["D"],
        "intermediate_size": s["F"], "num_hidden_layers": s["L"], "num_attention_heads": s["N"],
        "max_position_embeddings": CONTEXT, "rms_norm_eps": pick([1e-6, 1e-3]), "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "float32",
    } | more | ({"num_key_value_heads": s["K"]} if "num_key_value_heads" in more else {})  # fmt: skip


def linear(name: str, out: int, into: int, *, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, size: int, *, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (size,)} | ({f"{name}.bias": (size,)} if bias else {})


def in_layers(count: int, prefix: str, *parts: Shapes) -> Shapes:
    return {f"{prefix}.{i}.{name}": shape for i in range(count) for part in parts for name, shape in part.items()}


def llama_shapes(
    c: dict[str, Any], *, norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"), packed: bool = False
) -> Shapes:
    D, F, N = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    kv, bias = c.get("num_key_value_heads", N) * D // N, c.get("bias", False)
    separate = [
        linear(f"self_attn.{n}_proj", size, D, bias=bias) for n, size in (("q", D), ("k", kv), ("v", kv), ("o", D))
    ]
    qkv = [linear("self_attn.W_pack", 3 * D, D), linear("self_attn.o_proj", D, D)] if packed else separate
    return {
        "model.embed_tokens.weight": (V, D), **norm("model.norm", D), **linear("lm_head", V, D),
        **in_layers(c["num_hidden_layers"], "model.layers", *qkv, linear("mlp.gate_proj", F, D),
                    linear("mlp.up_proj", F, D), linear("mlp.down_proj", D, F), *(norm(n, D) for n in norms)),
    }  # fmt: skip


def internlm(pick: Pick) -> dict[str, Any]:
    rotary = pick([{"base": 500.0, "type": "origin"}, {"base": 10_000, "type": "dynamic", "scaling_factor": 2.0}])
    return llama_keys(pick, "internlm", "InternLMForCausalLM", bias=pick(FLAG), rotary=rotary)


def baichuan(pick: Pick) -> dict[str, Any]:
    c = llama_keys(pick, "baichuan", "BaichuanForCausalLM", model_max_length=CONTEXT)
    if pick(FLAG):
        c.pop("max_position_embeddings")
    return c | pick([{}, {"z_loss_weight": 0}])


def qwen(pick: Pick) -> dict[str, Any]:
    s = sizes(pick)
    return {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "vocab_size": V, "hidden_size": s["D"],
        "num_hidden_layers": s["L"], "num_attention_heads": s["N"], "kv_channels": s["H"],
        "intermediate_size": 2 * s["F"], "layer_norm_epsilon": pick([1e-6, 1e-3]), "seq_length": pick([CONTEXT, 5, 3]),
        "max_position_embeddings": CONTEXT, "rotary_emb_base": pick([100, 10_000]), "no_bias": pick(FLAG),
        "rotary_pct": pick([0.5, 1.0]), "tie_word_embeddings": False, 
        "use_dynamic_ntk": pick(FLAG), "use_logn_attn": pick(FLAG),
    }  # fmt: skip


def qwen_shapes(c: dict[str, Any]) -> Shapes:
    D, F, bias = c["hidden_size"], c["intermediate_size"] // 2, not c["no_bias"]
    return {
        "transformer.wte.weight": (V, D), **norm("transformer.ln_f", D), **linear("lm_head", V, D),
        **in_layers(c["num_hidden_layers"], "transformer.h", linear("attn.c_attn", 3 * D, D, bias=True),
                    linear("attn.c_proj", D, D, bias=bias), linear("mlp.w1", F, D, bias=bias),
                    linear("mlp.w2", F, D, bias=bias), linear("mlp.c_proj", D, F, bias=bias), norm("ln_1", D),
                    norm("ln_2", D)),
    }  # fmt: skip


def moss(pick: Pick) -> dict[str, Any]:
    return {
        "architectures": ["MossForCausalLM"], "model_type": "moss", "vocab_size": V, "n_embd": pick([32, 48]),
        "n_head": 4, "n_layer": pick([1, 2]), "n_positions": CONTEXT, "n_ctx": CONTEXT, "n_inner": pick([40, 33]),
        "rotary_dim": pick([2, 4]), "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False, "wbits": 32,
    }  # fmt: skip


def moss_shapes(c: dict[str, Any]) -> Shapes:
    D, F = c["n_embd"], c["n_inner"]
    return {
        "transformer.wte.weight": (V, D), **norm("transformer.ln_f", D, bias=True),
        **linear("lm_head", V, D, bias=True),
        **in_layers(c["n_layer"], "transformer.h", linear("attn.qkv_proj", 3 * D, D), linear("attn.out_proj", D, D),
                    linear("mlp.fc_in", F, D, bias=True), linear("mlp.fc_out", D, F, bias=True),
                    norm("ln_1", D, bias=True)),
    }  # fmt: skip


def chatglm2(pick: Pick) -> dict[str, Any]:
    s, shared = sizes(pick), pick(FLAG)
    c = {
        "architectures": ["ChatGLMModel"], "model_type": "chatglm", "padded_vocab_size": V, "num_layers": s["L"],
        "hidden_size": pick([24, 40]), "kv_channels": s["H"], "num_attention_heads": s["N"],
        "ffn_hidden_size": s["F"], "layernorm_epsilon": pick([1e-5, 1e-3]), "rmsnorm": pick(FLAG),
        "add_bias_linear": pick(FLAG), "add_qkv_bias": pick(FLAG), "multi_query_attention": shared,
        "multi_query_group_num": 1, "post_layer_norm": pick(FLAG), "seq_length": CONTEXT,
        "apply_residual_connection_post_layernorm": pick(FLAG), "original_rope": True, "tie_word_embeddings": False,
    }  # fmt: skip
    named = {"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 16}
    return c | pick([{}, {"rope_ratio": 500}, named, {"_name_or_path": "THUDM/chatglm3-6b-32k", "rope_ratio": 50}])


def chatglm2_shapes(c: dict[str, Any]) -> Shapes:
    D, F, bias, norms = c["hidden_size"], c["ffn_hidden_size"], c["add_bias_linear"], not c["rmsnorm"]
    N, H = c["num_attention_heads"], c["kv_channels"]
    K = c["multi_query_group_num"] if c["multi_query_attention"] else N
    last = norm("transformer.encoder.final_layernorm", D, bias=norms) if c["post_layer_norm"] else {}
    return {
        "transformer.embedding.word_embeddings.weight": (V, D), **last, **linear("transformer.output_layer", V, D),
        **in_layers(c["num_layers"], "transformer.encoder.layers",
                    linear("self_attention.query_key_value", (N + 2 * K) * H, D, bias=bias or c["add_qkv_bias"]),
                    linear("self_attention.dense", D, N * H, bias=bias),
                    linear("mlp.dense_h_to_4h", 2 * F, D, bias=bias), linear("mlp.dense_4h_to_h", D, F, bias=bias),
                    norm("input_layernorm", D, bias=norms), norm("post_attention_layernorm", D, bias=norms)),
    }  # fmt: skip


def sat(pick: Pick, kind: str, **more: Any) -> dict[str, Any]:
    s = sizes(pick)
    return {
        "model_type": kind, "vocab_size": V, "hidden_size": s["D"], "num_layers": s["L"], "num_attention_heads": s["N"],
        "inner_hidden_size": s["F"], "layernorm_epsilon": 1e-5, "max_sequence_length": CONTEXT,
    } | more  # fmt: skip


def sat_shapes(c: dict[str, Any]) -> Shapes:
    D, F = c["hidden_size"], c["inner_hidden_size"]
    up = F if c.get("no_glu", "layernorm_order" not in c) else 2 * F
    return {
        "transformer.word_embeddings.weight": (V, D), **norm("transformer.final_layernorm", D, bias=True),
        **in_layers(c["num_layers"], "transformer.layers", linear("attention.query_key_value", 3 * D, D, bias=True),
                    linear("attention.dense", D, D, bias=True), linear("mlp.dense_h_to_4h", up, D, bias=True),
                    linear("mlp.dense_4h_to_h", D, F, bias=True), norm("input_layernorm", D, bias=True),
                    norm("post_attention_layernorm", D, bias=True)),
    }  # fmt: skip


def pangu(pick: Pick) -> dict[str, Any]:
    s = sizes(pick)
    return {
        "architectures": ["GPTPanguForCausalLM"], "model_type": "gpt_pangu", "vocab_size": V, "hidden_size": s["D"],
        "num_layers": s["L"] + 1, "num_heads": s["N"], "intermediate_size": pick([None, s["F"]]),
        "max_position_embeddings": CONTEXT, "activation_function": "gelu", "layer_norm_epsilon": pick([1e-5, 1e-3]),
        "scale_attn_weights": True,
    }  # fmt: skip


def pangu_shapes(c: dict[str, Any]) -> Shapes:
    D, F = c["hidden_size"], c["intermediate_size"] or 4 * c["hidden_size"]
    attention = [linear(f"attn.{n}_proj", D, D, bias=True) for n in "qkvc"]
    return {
        "transformer.wte.weight": (V, D),
        "transformer.wpe.weight": (CONTEXT, D), "transformer.wqe.weight": (CONTEXT, D),
        **norm("transformer.ln_f", D, bias=True),
        **in_layers(c["num_layers"], "transformer.h", *attention, linear("mlp.c_fc", F, D, bias=True),
                    linear("mlp.c_proj", D, F, bias=True), norm("ln_1", D, bias=True), norm("ln_2", D, bias=True)),
    }  # fmt: skip


def codegeex(pick: Pick) -> dict[str, Any]:
    s = sizes(pick)
    return {
        "model_type": "codegeex", "padded_vocab_size": V, "hidden_size": s["D"], "num_layers": s["L"],
        "num_attention_heads": s["N"], "max_position_embeddings": CONTEXT,
    }  # fmt: skip


def codegeex_shapes(c: dict[str, Any]) -> Shapes:
    D, p = c["hidden_size"], "language_model.transformer"
    layer = [
        *(linear(f"attention.{n}", D, D, bias=True) for n in ("query", "key", "value", "dense")),
        linear("mlp.dense_h_to_4h", 4 * D, D, bias=True), linear("mlp.dense_4h_to_h", D, 4 * D, bias=True),
        norm("input_layernorm", D, bias=True), norm("post_attention_layernorm", D, bias=True),
    ]  # fmt: skip
    return {
        "language_model.embedding.word_embeddings.weight": (V, D),
        "language_model.embedding.position_embeddings.weight": (CONTEXT, D),
        "language_model.topQueryEmbedding.top_query_embeddings.weight": (CONTEXT, D),
        **norm(f"{p}.final_layernorm", D, bias=True), **in_layers(c["num_layers"], f"{p}.layers", *layer),
        **{f"{p}.topQueryLayer.{name}": shape for part in layer for name, shape in part.items()},
    }  # fmt: skip


def megatron(pick: Pick, version: float) -> dict[str, Any]:
    s = sizes(pick)
    return {
        "model_type": "megatron-gpt2", "padded_vocab_size": V, "hidden_size": s["D"], "num_layers": s["L"],
        "num_attention_heads": s["N"], "ffn_hidden_size": s["F"], "max_position_embeddings": CONTEXT,
        "layernorm_epsilon": 1e-5, "openai_gelu": pick(FLAG), "bias_gelu_fusion": pick(FLAG),
    } | ({"checkpoint_version": version} if version else {})  # fmt: skip


def megatron_shapes(c: dict[str, Any]) -> Shapes:
    D, F = c["hidden_size"], c["ffn_hidden_size"]
    stack, attention = (
        ("encoder", "self_attention") if c.get("checkpoint_version") == 3 else ("transformer", "attention")
    )
    return {
        "language_model.embedding.word_embeddings.weight": (V, D),
        "language_model.embedding.position_embeddings.weight": (CONTEXT, D),
        **norm(f"language_model.{stack}.final_layernorm", D, bias=True),
        **in_layers(c["num_layers"], f"language_model.{stack}.layers",
                    linear(f"{attention}.query_key_value", 3 * D, D, bias=True),
                    linear(f"{attention}.dense", D, D, bias=True), linear("mlp.dense_h_to_4h", F, D, bias=True),
                    linear("mlp.dense_4h_to_h", D, F, bias=True), norm("input_layernorm", D, bias=True),
                    norm("post_attention_layernorm", D, bias=True)),
    }  # fmt: skip


CASES = {
    "Yi": Case(
        lambda pick: llama_keys(pick, "Yi", "YiForCausalLM", num_key_value_heads=0, rope_theta=pick([5e6, 100.0])),
        lambda c: llama_shapes(c, norms=("ln1", "ln2")),
        references.yi,
    ),
    "aquila": Case(
        lambda pick: llama_keys(pick, "aquila", "AquilaForCausalLM", num_key_value_heads=0),
        llama_shapes,
        references.llama,
    ),
    "internlm": Case(internlm, llama_shapes, references.internlm),
    "baichuan": Case(baichuan, lambda c: llama_shapes(c, packed=True), references.baichuan),
    "qwen": Case(qwen, qwen_shapes, references.qwen),
    "moss": Case(moss, moss_shapes, references.moss),
    "chatglm2": Case(chatglm2, chatglm2_shapes, references.chatglm2),
    "glm-130b": Case(
        lambda pick: sat(pick, "glm-130b", layernorm_order="post"), sat_shapes, references.glm130b, prefix=True
    ),
    "chatglm": Case(lambda pick: sat(pick, "chatglm"), sat_shapes, references.chatglm, prefix=True),
    "gpt_pangu": Case(pangu, pangu_shapes, references.pangu),
    "codegeex": Case(codegeex, codegeex_shapes, references.codegeex),
    "megatron-gpt2": Case(lambda pick: megatron(pick, 3.0), megatron_shapes, references.megatron),
    "megatron-gpt2-v2": Case(lambda pick: megatron(pick, 2.0), megatron_shapes, references.megatron),
    "megatron-gpt2-v1": Case(lambda pick: megatron(pick, 1.0), megatron_shapes, references.megatron),
    "megatron-gpt2-v0": Case(lambda pick: megatron(pick, 0.0), megatron_shapes, references.megatron),
}


def test_every_family_is_drawn():
    assert {family.kind for family in remote.FAMILIES} == set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_random_models_are_read_computed_and_written_as_their_equations_say(kind, tmp_path_factory):
    case = CASES[kind]

    @few(max_examples=4)
    @given(st.data(), st.integers(0, 2**31))
    def check(data: st.DataObject, seed: int) -> None:
        config, tensors, read, folder = drawn(kind, data, seed, tmp_path_factory)
        assert_same_logits(case, tensors, config, built(read), seed)
        assert_same_files(read, folder, tensors)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_a_random_model_goes_on_as_its_equations_say(kind, tmp_path_factory):
    case = CASES[kind]

    @few(max_examples=1)
    @given(st.data(), st.integers(0, 2**31))
    def check(data: st.DataObject, seed: int) -> None:
        config, tensors, read, _ = drawn(kind, data, seed, tmp_path_factory)
        assert_same_continuations(case, tensors, config, built(read), seed)

    check()


def drawn(kind: str, data: st.DataObject, seed: int, folders: Any) -> tuple[dict, dict, Any, Path]:
    """A random model's config and tensors, and the folder it lies in, read."""
    case, folder = CASES[kind], folders.mktemp(kind)
    config = case.config(lambda options: data.draw(st.sampled_from(options)))
    tensors = randomised(case.shapes(config), seed)
    write(folder / "theirs", config, tensors)
    read = open_folder(folder / "theirs")
    assert read.family.kind == kind
    return config, tensors, read, folder


def randomised(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """Noise in every tensor; around 1 in the scales of norms."""
    rng = np.random.default_rng(seed)
    noise = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    scales = {name for name in shapes if "norm" in name.rsplit(".", 2)[-2] or "ln" in name.rsplit(".", 2)[-2]}
    return {
        name: (x * x.shape[-1] ** -0.5 if x.ndim == 2 else 0.2 * x + (name in scales and name.endswith("weight")))
        .astype(np.float32)
        for name, x in noise.items()
    }  # fmt: skip


def write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def built(read: Any) -> Any:
    """Our model of a folder."""
    graphdef, shapes, _ = abstract(read.cfg)
    return merge(graphdef, load(read.weights, read.cfg, shapes))


class Recorded(dict):
    """Tensors that remember which were looked at."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        super().__init__(tensors)
        self.seen = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.seen.add(name)
        return super().__getitem__(name)


def computed(case: Case, tensors: dict[str, np.ndarray], config: dict[str, Any], ids: Any, prefix: int) -> np.ndarray:
    recorded = Recorded(tensors)
    logits = case.logits(recorded, config, np.asarray(ids), *([prefix] if case.prefix else []))
    assert recorded.seen == set(tensors)  # the reference is of the whole model
    return logits


def prefix_of(case: Case, length: int) -> int:
    """How many tokens of so many are a prefix that all see."""
    return length // 2 if case.prefix else 0


def assert_same_logits(case: Case, tensors: Any, config: dict[str, Any], ours: Any, seed: int) -> None:
    """Documents packed in one row, against the reference one by one."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, V, n) for n in LENGTHS]
    pad = [0] * (T - sum(LENGTHS))
    parts = (
        ids, [np.arange(n) for n in LENGTHS], [np.full(n, d + 1) for d, n in enumerate(LENGTHS)],
        [np.arange(n) < prefix_of(case, n) for n in LENGTHS],
    )  # fmt: skip
    *row, prefix = (jnp.asarray(np.concatenate([*part, pad])[None].astype(np.int32)) for part in parts)
    got = np.asarray(jax.jit(lambda m, *row, prefix: m(*row, prefix_BT=prefix > 0))(ours, *row, prefix=prefix))
    wanted = [computed(case, tensors, config, x, prefix_of(case, len(x))) for x in ids]
    np.testing.assert_allclose(got[0, : sum(LENGTHS)], np.concatenate(wanted), atol=1e-4, rtol=0)


def assert_same_continuations(case: Case, tensors: Any, config: dict[str, Any], ours: Any, seed: int) -> None:
    """A left-padded batch, 8 tokens, each the likeliest by the reference on all tokens before it."""
    rng = np.random.default_rng(seed + 1)
    prompts = [rng.integers(1, V, n).tolist() for n in (3, 8)]
    assert ours.cfg.context >= 16
    prefixes = [prefix_of(case, len(p)) for p in prompts]
    said = generate(ours, prompts, max_new_tokens=8, prefix_lens=prefixes if case.prefix else None)
    for prompt, prefix, completion in zip(prompts, prefixes, said, strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(computed(case, tensors, config, ids, prefix)[-1].argmax()))
        assert list(completion.tokens) == ids[len(prompt) :]


def assert_same_files(read: Any, folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Written by us: the same config and tensors to the bit; without the source, a config that says the same."""
    dtypes = {n: np.dtype("float32") for n in read.weights}
    weights = (read.weights.shapes, read.weights.__getitem__, dtypes)
    save_folder(folder / "back", read.cfg, *weights, source=read.source)
    save_folder(folder / "new", read.cfg, *weights, family=read.family)
    assert (folder / "back/config.json").read_bytes() == (folder / "theirs/config.json").read_bytes()
    for side in ("back", "new"):
        again = open_folder(folder / side)
        assert again.family is read.family
        assert differences(resolved(again.cfg), resolved(read.cfg)) == []
        assert set(again.tensors) == set(tensors)
        for name, x in tensors.items():
            assert again.tensors.read(name).tobytes() == x.tobytes()
            assert again.tensors[name].shape == x.shape


# --- what the drawn models do not show -----------------------------------------------------------------------------


def tiny(kind: str, folder: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The first config of a family, changed, and tensors, which are in the folder now."""
    config = CASES[kind].config(lambda options: options[0]) | changes
    tensors = randomised(CASES[kind].shapes(config), seed=1)
    write(folder, config, tensors)
    return config, tensors


def test_internlm_turns_a_document_longer_than_its_context_as_its_code_does(tmp_path):
    rotary = {"base": 10_000, "type": "dynamic", "scaling_factor": 2.0}
    config, tensors = tiny("internlm", tmp_path / "m", rotary=rotary, max_position_embeddings=8)
    assert max(LENGTHS) > 8
    assert_same_logits(CASES["internlm"], tensors, config, built(open_folder(tmp_path / "m")), seed=2)


def test_configs_of_one_model_type_are_told_apart_by_their_keys(tmp_path):
    assert family_of({"model_type": "chatglm", "ffn_hidden_size": 8}, "c").kind == "chatglm2"
    assert family_of({"model_type": "chatglm", "inner_hidden_size": 8}, "c").kind == "chatglm"
    assert family_of({"model_type": "megatron-gpt2"}, "c").kind == "megatron-gpt2-v0"
    assert family_of({"model_type": "megatron-gpt2", "checkpoint_version": 3.0}, "c").kind == "megatron-gpt2"
    with pytest.raises(CheckpointError, match=r'"chatglm" with keys of none of .*chatglm2'):
        family_of({"model_type": "chatglm"}, "c")


def test_baichuan_configs_say_which_of_the_four_they_are():
    read = BY_KIND["baichuan"].ours
    first7b = CASES["baichuan"].config(lambda options: options[0]) | {"max_position_embeddings": CONTEXT}
    first13b = {k: v for k, v in first7b.items() if k != "max_position_embeddings"}
    assert (read(first7b).position.kind, read(first7b).head_norm) == ("rope", False)
    assert (read(first13b).position.kind, read(first13b).head_norm) == ("alibi", False)
    assert read(first7b | {"vocab_size": 125_696}).head_norm and read(first13b | {"z_loss_weight": 0}).head_norm
    write_back = BY_KIND["baichuan"].theirs
    assert write_back(read(first7b))["architectures"] == ["BaiChuanForCausalLM"]
    assert write_back(read(first13b))["architectures"] == ["BaichuanForCausalLM"]


@pytest.mark.parametrize("kind, key, value", [
    ("internlm", "rotary", {"type": "yarn", "base": 1e4}), ("moss", "wbits", 8), ("chatglm2", "quantization_bit", 4),
    ("chatglm2", "tie_word_embeddings", True), ("chatglm2", "vision_config", {}), ("chatglm", "pre_seq_len", 64),
    ("glm-130b", "layernorm_order", "pre"),
])  # fmt: skip
def test_what_a_family_cannot_have_is_refused_by_its_key(kind, key, value):
    config = CASES[kind].config(lambda options: options[0]) | {key: value}
    with pytest.raises(CheckpointError, match=f"{key}="):
        BY_KIND[kind].ours(config)


def test_a_model_of_another_family_is_refused_on_the_way_out():
    llama = DecoderConfig.model_validate({"vocab": V, "embed": 32, "block": {"ffn": {"mlp": 40}}})
    assert fitting(llama).kind == "llama"
    with pytest.raises(ConfigError, match=r"no glm-130b is like this model: .*block\.norm\.kind"):
        BY_KIND["glm-130b"].theirs(llama)


def test_chatglm_fills_a_mask_in_the_middle_of_a_prompt(tmp_path):
    """[MASK] at place 2 of 6 tokens: places are 0 1 2 3 4 5, then 2 2 2 2 and 1 2 3 4 (arXiv:2103.10360, figure 2)."""
    config, tensors = tiny("chatglm", tmp_path / "m")
    ids = np.random.default_rng(4).integers(0, V, 10)
    first, second = [0, 1, 2, 3, 4, 5, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]
    rows = (jnp.asarray(x, jnp.int32)[None] for x in (ids, first, np.ones(10)))
    got = built(open_folder(tmp_path / "m"))(
        *rows, prefix_BT=jnp.arange(10)[None] < 6, block_BT=jnp.asarray(second, jnp.int32)[None]
    )
    np.testing.assert_allclose(got[0], references.chatglm(tensors, config, ids, 6, mask=2), atol=1e-4, rtol=0)


def test_rows_of_baichuan_2s_head_may_have_any_length(tmp_path):
    """NormHead (arXiv:2309.10305, section 2.3): only the direction of a row counts."""
    config, tensors = tiny("baichuan", tmp_path / "one", z_loss_weight=0)
    lengths = np.random.default_rng(5).uniform(0.1, 9, (V, 1)).astype(np.float32)
    write(tmp_path / "two", config, tensors | {"lm_head.weight": tensors["lm_head.weight"] * lengths})
    row = [jnp.arange(9, dtype=jnp.int32)[None]] * 2 + [jnp.ones((1, 9), jnp.int32)]
    one, two = (built(open_folder(tmp_path / name))(*row) for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-5)


def published_llama(kind: str, V: int, D: int, F: int, L: int, N: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
        "num_attention_heads": N, "max_position_embeddings": 4096,
    } | more  # fmt: skip


def published_glm(V: int, L: int) -> dict[str, Any]:
    return {
        "model_type": "chatglm", "padded_vocab_size": V, "num_layers": L, "hidden_size": 4096, "ffn_hidden_size": 13696,
        "kv_channels": 128, "num_attention_heads": 32, "multi_query_attention": True, "multi_query_group_num": 2,
        "add_qkv_bias": True,
    }  # fmt: skip


def published_pangu(D: int, L: int, N: int) -> dict[str, Any]:
    return {"model_type": "gpt_pangu", "vocab_size": 40_000, "hidden_size": D, "num_layers": L, "num_heads": N}


# What config.json of the published models says, or the tables of their papers; parameters; how exact those are.
PUBLISHED = [
    (published_llama("baichuan", 64_000, 4096, 11_008, 32, 32), 7_000_559_616, 0),  # its README
    (published_llama("baichuan", 64_000, 5120, 13_696, 40, 40), 13_264_901_120, 0),  # its README
    (published_llama("Yi", 64_000, 7168, 20_480, 60, 56), 34.4e9, 0.001),  # arXiv:2403.04652
    (published_llama("aquila", 100_008, 4096, 11_008, 32, 32), 7.3e9, 0.01),  # FlagAI
    (published_llama("internlm", 103_168, 5120, 13_824, 60, 40, bias=False), 20.1e9, 0.001),  # InternLM
    (published_llama("qwen", 151_936, 4096, 22_016, 32, 32), 7_721_324_544, 0),  # its weights
    (published_llama("qwen", 152_064, 8192, 49_152, 80, 64), 72.3e9, 0.001),  # its weights
    (published_glm(65_024, 28), 6_243_584_000, 0),  # ChatGLM2, its weights
    (published_glm(151_552, 40), 9.4e9, 0.001),  # GLM-4 9B
    ({"model_type": "chatglm", "vocab_size": 130_528, "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32,
      "inner_hidden_size": 16_384}, 6.2e9, 0.01),
    ({"model_type": "glm-130b", "vocab_size": 150_528, "hidden_size": 12_288, "num_layers": 70,
      "num_attention_heads": 96, "inner_hidden_size": 32_768}, 130e9, 0.02),  # arXiv:2210.02414
    ({"model_type": "moss", "vocab_size": 107_008, "n_embd": 6144, "n_layer": 34, "n_head": 24}, 16_717_980_160, 0),
    (published_pangu(2560, 32, 32), 2.6e9, 0.01),  # arXiv:2104.12369, table 1
    (published_pangu(5120, 40, 40), 13e9, 0.02),
    (published_pangu(16_384, 64, 128), 200e9, 0.04),
    ({"model_type": "codegeex", "hidden_size": 5120, "num_layers": 39, "num_attention_heads": 40}, 13e9, 0.01),
]  # fmt: skip


def test_published_configs_have_the_parameters_that_were_published():
    for config, published, exact in PUBLISHED:
        cfg = family_of(config, "config.json").ours(config)
        assert parameters(cfg) == pytest.approx(published, rel=exact, abs=0), config


def palm(layers: int, embed: int, heads: int, head_dim: int = 256, vocab: int = 256_000) -> DecoderConfig:
    return DecoderConfig.model_validate({
        "vocab": vocab, "context": CONTEXT, "embed": embed, "num_layers": layers, "tie": True,
        "logit_scale": embed**-0.5,
        "block": {
            "placement": {"kind": "parallel"}, "norm": {"kind": "layernorm", "bias": False},
            "attention": {"num_heads": heads, "num_kv_heads": 1, "head_dim": head_dim}, "ffn": {"mlp": 4 * embed},
        },
    })  # fmt: skip


def test_palm_has_the_sizes_of_its_paper():
    """Chowdhery et al. 2022, arXiv:2204.02311, table 1."""
    sizes = [parameters(palm(*shape)) / 1e9 for shape in ((32, 4096, 16), (64, 8192, 32), (118, 18_432, 48))]
    assert sizes == pytest.approx([8.63, 62.50, 540.35], abs=0.01)


def test_palm_is_a_config():
    """PaLM has no public weights: the same matrices in our names and in the reference's."""
    D, L = 24, 2
    cfg = palm(L, D, heads=3, head_dim=8, vocab=V)
    graphdef, shapes, _ = abstract(cfg)
    rng = np.random.default_rng(3)
    params = {name: rng.normal(size=x.shape).astype(np.float32) * (D**-0.5) for name, x in shapes.items()}
    logical = unstack(params, cfg)
    names = {"q": "attention.w_q", "k": "attention.w_k", "v": "attention.w_v", "o": "attention.w_o",
             "gate": "ffn.w_gate", "up": "ffn.w_up", "down": "ffn.w_down", "norm": "norm_attention.scale"}  # fmt: skip
    theirs = {f"{i}.{n}": logical[f"layers.{i}.{ours}"] for i in range(L) for n, ours in names.items()}
    theirs |= {"embedding": logical["embedding"], "norm": logical["final_norm.scale"]}
    assert len(theirs) == len(logical)  # no biases
    ids = rng.integers(0, V, 12)
    model = merge(graphdef, {name: jnp.asarray(x) for name, x in params.items()})
    got = model(*(jnp.asarray(x[None], jnp.int32) for x in (ids, np.arange(12), np.ones(12))))
    np.testing.assert_allclose(got[0], references.palm(theirs, ids, L, 1e-5), atol=1e-4, rtol=0)

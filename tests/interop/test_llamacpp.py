"""Models written as GGUF, against gguf-py's names and keys, transformers' reader and llama.cpp's converters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_decoders as decoders
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.core.config import merge as merge_trees
from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.interop import llamacpp
from jaxllm.interop.family import differences, resolved
from jaxllm.interop.folder import open_folder
from jaxllm.interop.weights import load
from jaxllm.models.config import DecoderConfig, EncoderConfig
from jaxllm.models.module import abstract, merge
from jaxllm.verbs import convert

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

few = settings(decoders.few, max_examples=3)
NO_BIAS = {"attention_bias": False}
SILU = {"hidden_act": "silu"}
GEMMA = NO_BIAS | {"tie_word_embeddings": True}
# What llama.cpp computes of each family, laid over the random configs of test_decoders; and its name there.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LLAMA", SILU), "mistral": ("LLAMA", SILU), "qwen2": ("QWEN2", SILU), "qwen3": ("QWEN3", SILU | NO_BIAS),
    "gemma": ("GEMMA", GEMMA | {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": ("GEMMA2", GEMMA | {
        "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    }),
    "gemma3_text": ("GEMMA3", NO_BIAS | {"hidden_activation": "gelu_pytorch_tanh"}),
    "olmo": ("OLMO", SILU | NO_BIAS), "olmo2": ("OLMO2", SILU | NO_BIAS), "phi3": ("PHI3", SILU),
    "phi": ("PHI2", {"hidden_act": "gelu_new", "qk_layernorm": False}),
    "starcoder2": ("STARCODER2", {"hidden_act": "gelu_pytorch_tanh", "use_bias": True}),
    "gpt2": ("GPT2", {
        "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    }),
    "gpt_bigcode": ("STARCODER", {"scale_attn_weights": True}),
    "gpt_neox": ("GPTNEOX", {"hidden_act": "gelu", "attention_bias": True}),
    "bloom": ("BLOOM", {"apply_residual_connection_post_layernorm": False}),
    "falcon": ("FALCON", {"parallel_attn": True, "alibi": False, "bias": False}),
    "mpt": ("MPT", {}),
}  # fmt: skip
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "starcoder2", "gpt2", "bloom")


def model_of(name, draw, seed):
    """A random model of transformers that llama.cpp can compute."""
    config = decoders.DRAWN[name](draw)
    for key, value in FAMILIES[name][1].items():
        setattr(config, key, value)
    rope = getattr(config, "rope_parameters", None)
    if rope and rope.get("rope_type") == "dynamic":
        rope["rope_type"] = "default"
    if name == "mpt":
        config.attn_config.softmax_scale = None
    return decoders.randomised(config, seed)


def expected(model, read) -> dict[str, np.ndarray]:
    """What llama.cpp's converters make of a model's tensors, by gguf-py's names: slowly, from their documentation."""
    arch, config = gguf.MODEL_ARCH[FAMILIES[model.config.model_type][0]], read.cfg
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    N, K, H = config.block.attention.num_heads, config.block.attention.kv_heads, config.head_dim(config.block.attention)
    out = {}
    for name in read.tensors:
        x = read.tensors.read(name)
        bare = name.removeprefix("transformer.") if arch.name == "BLOOM" else name  # as its published files have it
        found = names.get_name(bare, try_suffixes=(".weight", ".bias"))
        assert found, name
        if arch.name == "GPT2" and x.ndim == 2 and "blk." in found:
            x = x.T
        if arch.name in ("LLAMA", "OLMO") and ("attn_q." in found or "attn_k." in found):
            x = np.concatenate([h[[i // 2 + i % 2 * H // 2 for i in range(H)]] for h in x.reshape(-1, H, *x.shape[1:])])
        if arch.name.startswith("GEMMA") and "norm" in found:
            x = x + np.float32(1)
        if arch.name in ("GPTNEOX", "BLOOM", "FALCON") and "attn_qkv" in found:
            groups = x.reshape(K, N // K + 2, H, *x.shape[1:])
            parts = groups[:, :-2], groups[:, -2], groups[:, -1]
            x = np.concatenate([part.reshape(-1, *x.shape[1:]) for part in parts])
        if arch.name == "STARCODER" and "attn_qkv" in found and K > 1:
            groups = x.reshape(N, 3, H, *x.shape[1:])
            x = np.concatenate([groups[:, i].reshape(-1, *x.shape[1:]) for i in range(3)])
        out[found] = x
    return out


def known_keys(arch: str) -> set[str]:
    """The metadata that gguf-py knows, for an architecture."""

    def walk(keys: type) -> set[str]:
        out = set()
        for value in vars(keys).values():
            out |= walk(value) if isinstance(value, type) else {value} if isinstance(value, str) else set()
        return out

    return {key.replace("{arch}", arch) for key in walk(gguf.Keys)}


def read_back(path):
    """Our model of a GGUF file, and its config."""
    _, cfg, weights, _ = llamacpp.open_model(path)
    graphdef, shapes, _ = abstract(cfg)
    return merge(graphdef, load(weights, cfg, shapes)), cfg


def logits(model, seed):
    ids_BT = jnp.asarray(np.random.default_rng(seed).integers(0, decoders.V, (1, 20)), jnp.int32)
    return np.asarray(jax.jit(lambda m, ids: m(ids, jnp.arange(20)[None], jnp.ones_like(ids)))(model, ids_BT))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_random_model_is_written_as_llamacpp_converters_do_and_computes_the_same(name, tmp_path_factory):
    @few
    @given(st.data(), st.integers(0, 2**31))
    def check(data, seed):
        folder = tmp_path_factory.mktemp(name)
        model = model_of(name, data.draw, seed)
        model.save_pretrained(folder / "theirs")
        file = convert(folder / "theirs", folder / "model.gguf", dtype="float32")
        folder_model, read = decoders.opened(folder / "theirs")
        theirs = gguf.GGUFReader(file)
        arch = gguf.MODEL_ARCH[FAMILIES[name][0]]
        assert set(theirs.fields) - {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"} <= known_keys(
            gguf.MODEL_ARCH_NAMES[arch]
        )
        assert theirs.get_field("general.architecture").contents() == gguf.MODEL_ARCH_NAMES[arch]
        wanted = expected(model, read)
        tensors = {t.name: t for t in theirs.tensors}
        assert wanted.keys() == tensors.keys() - set(llamacpp.DIVISORS)
        allowed = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[arch]}
        for tensor_name, t in tensors.items():
            general = ".".join("{bid}" if part.isdigit() else part for part in tensor_name.split(".")[:-1])
            assert general in allowed or general.startswith("rope_")
            if tensor_name in wanted:
                np.testing.assert_allclose(t.data, wanted[tensor_name], atol=2e-7 if "gemma" in name else 0, rtol=0)
        again, _ = read_back(file)
        np.testing.assert_allclose(logits(again, seed), logits(folder_model, seed), atol=1e-5, rtol=0)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_weights_and_sizes_of_a_written_file(name, tmp_path_factory):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    @few
    @given(st.data(), st.integers(0, 2**31))
    def check(data, seed):
        folder = tmp_path_factory.mktemp(name)
        model = model_of(name, data.draw, seed)
        model.save_pretrained(folder / "theirs")
        file = convert(folder / "theirs", folder / "model.gguf", dtype="float32")
        found = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
        state = model.state_dict()
        assert state.keys() - found["tensors"].keys() <= {"lm_head.weight"}
        for key, x in found["tensors"].items():
            if key in state:  # divisors of RoPE are not
                np.testing.assert_allclose(x.numpy(), state[key].numpy(), atol=2e-7 if "gemma" in name else 0, rtol=0)
        for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"):
            if key in found["config"] and getattr(model.config, key, None) is not None:
                assert found["config"][key] == getattr(model.config, key)

    check()


# --- one small model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A LLaMA of transformers whose rows are whole blocks, but for those of `down`; in bfloat16."""
    folder = tmp_path_factory.mktemp("theirs")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    decoders.randomised(config, 0).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0", "q4_0", None])
def test_matrices_take_the_kind_asked_for_to_the_bits_of_gguf_py_and_vectors_stay_whole(theirs, dtype, tmp_path):
    file = convert(theirs, tmp_path / "model.gguf", dtype=dtype)
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", None: "BF16"}.get(dtype, str(dtype).upper())
    reader, (whole, _) = gguf.GGUFReader(file), open_and_sources(theirs)
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType[
        {"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")
    ]  # fmt: skip
    for t in reader.tensors:
        x = whole[t.name]
        stored = kind
        if x.ndim == 1:
            stored = "F32"
        elif kind == "Q4_0" and t.name == "token_embd.weight":
            stored = "Q8_0"  # the head too
        elif "Q" in kind and x.shape[1] % 32:
            stored = "F16"
        assert t.tensor_type.name == stored
        wanted = gguf.quants.quantize(x, gguf.GGMLQuantizationType[stored])
        assert t.data.tobytes() == wanted.tobytes()


def open_and_sources(folder):
    """The tensors that a file of float32 holds of a folder, and the folder."""
    read = open_folder(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wanted = {name: np.ascontiguousarray(x, np.float32) for name, x in expected(model, read).items()}
    return wanted, read


def test_a_written_file_goes_back_to_a_folder_with_the_same_weights(theirs, tmp_path):
    file = convert(theirs, tmp_path / "model.gguf")
    before, after = open_folder(theirs), open_folder(convert(file, tmp_path / "back", family="llama"))
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        np.testing.assert_array_equal(before.tensors.read(name).astype(np.float32), after.tensors.read(name))
    assert not differences(resolved(before.cfg), resolved(after.cfg))


def test_a_checkpoint_and_the_folder_that_it_came_from_give_the_same_file(theirs, tmp_path):
    file = convert(theirs, tmp_path / "model.gguf")
    (tmp_path / "again").mkdir()
    again = convert(convert(theirs, tmp_path / "run"), tmp_path / "again/model.gguf")
    assert file.read_bytes() == again.read_bytes()


def test_a_file_written_again_is_the_same_file(tmp_path):
    """Of an architecture that is not the first to have such a model."""
    config = transformers.Qwen2Config(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    decoders.randomised(config, 0).save_pretrained(tmp_path / "theirs")
    file = convert(tmp_path / "theirs", tmp_path / "model.gguf")
    (tmp_path / "again").mkdir()
    assert convert(file, tmp_path / "again/model.gguf").read_bytes() == file.read_bytes()


def test_tensors_are_read_one_at_a_time_and_a_failure_leaves_nothing(theirs, tmp_path):
    read = open_folder(theirs)
    asked = []

    def take(name):
        asked.append(name)
        if len(asked) == 5:
            raise RuntimeError("no more")
        return read.weights[name]

    with pytest.raises(RuntimeError, match="no more"):
        llamacpp.save_model(
            tmp_path / "model.gguf", read.cfg, read.weights.shapes, take, "F16",
            vocabulary={"tokenizer.ggml.model": "none"},
        )  # fmt: skip
    assert len(asked) == 5 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"block": {"ffn": {"activation": "relu"}}}, "block.ffn.activation is 'relu', there 'silu'"),
        ({"position": {"scaling": {"kind": "ntk", "factor": 2.0}}}, "scaling is .*'kind': 'ntk'"),
        ({"position": {"fraction": 0.5}}, "rope.dimension_count=8; only whole heads, of 16, are read"),
    ],
)
def test_what_llamacpp_does_not_compute_is_refused(theirs, changes, why):
    cfg = DecoderConfig.model_validate(merge_trees(open_folder(theirs).cfg.model_dump(), changes))
    with pytest.raises(ConfigError, match=f"no llama is like this model: .*{why}"):
        llamacpp.architecture(cfg, "llama")


def test_without_a_family_the_first_architecture_that_has_the_model_is_taken(theirs):
    cfg = open_folder(theirs).cfg.model_dump()
    kinds = {"llama": {}, "phi3": {"position": {"fraction": 0.5}}, "qwen2": {"block": {"attention": {"bias": True}}}}
    for kind, changes in kinds.items():
        found = DecoderConfig.model_validate(merge_trees(cfg, changes))
        assert llamacpp.architecture(found).kind == ("llama" if kind == "qwen2" else kind)
        assert llamacpp.architecture(found, kind).kind == kind
    with pytest.raises(ConfigError, match="no architecture of llama.cpp that is known here has such a model"):
        llamacpp.architecture(DecoderConfig.model_validate(merge_trees(cfg, {"position": {"kind": "sinusoidal"}})))


def test_blocks_are_for_gguf_files_and_families_for_what_is_written(theirs, tmp_path):
    with pytest.raises(ConfigError, match="dtype=q8_0 is of GGUF files only"):
        convert(theirs, tmp_path / "folder", dtype="q8_0")
    with pytest.raises(ConfigError, match="family='gemma3_text' is not known; known: bloom, falcon"):
        convert(theirs, tmp_path / "model.gguf", family="gemma3_text")
    assert not list(tmp_path.iterdir())


def test_only_decoders_are_written():
    with pytest.raises(ConfigError, match="only decoders are written as GGUF, and this is a model of kind encoder"):
        llamacpp.architecture(EncoderConfig(vocab=9))


def test_an_architecture_that_is_not_known_is_refused(tmp_path):
    from jaxllm.interop.gguf import write_gguf

    write_gguf(tmp_path / "x.gguf", {"general.architecture": "rwkv6"}, {}, kinds="F32")
    with pytest.raises(
        CheckpointError, match="general.architecture='rwkv6' is no architecture that is known here: llama"
    ):
        llamacpp.open_model(tmp_path / "x.gguf")

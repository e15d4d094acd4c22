import io

import jax
import jax.numpy as jnp
import pytest

from jaxllm.core.errors import CheckpointError, ConfigError
from jaxllm.data import tokenizers
from jaxllm.data.config import ByteTokenizer
from jaxllm.generate import run
from jaxllm.inference.config import GenerateConfig, Greedy, Sample
from jaxllm.models.config import FFN, Attention, Block, DecoderConfig
from jaxllm.models.module import create
from jaxllm.pretrained import load
from jaxllm.train.checkpoint import Checkpointer
from jaxllm.train.config import Checkpoints


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with checkpoints of steps 5 and 7: random weights, a table with rows to spare."""
    return write_run(tmp_path_factory.mktemp("run"), "float32")


def write_run(folder, precision):
    tokenizer = tokenizers.build(ByteTokenizer())
    tokenizer.save(folder / "tokenizer")
    block = Block(attention=Attention(num_heads=2), ffn=FFN(mlp=16))
    cfg = DecoderConfig(vocab=tokenizer.vocab_size + 64, context=64, embed=16, num_layers=2, block=block)
    files = {"tokenizer": folder / "tokenizer", "config.yaml": f"precision: {{kind: {precision}}}\n"}
    made = jax.jit(lambda key: create(cfg, key))
    with Checkpointer(folder / "checkpoints", Checkpoints(), cfg, extra_files=files) as saver:
        for step in (5, 7):
            saver.save(step, {"step": jnp.int32(step), "params": made(jax.random.key(step))}, {})
    return folder


def asked(folder, *prompt, **fields):
    out = io.StringIO()
    cfg = GenerateConfig(model=str(folder), prompt=prompt, **{"max_new_tokens": 12, "sampling": Sample()} | fields)
    return run(cfg, out), out.getvalue()


def test_what_is_streamed_is_the_prompt_and_its_completion(run_folder):
    [completion], streamed = asked(run_folder, "déjà ")
    assert streamed == "déjà " + completion.text + "\n"
    assert asked(run_folder, "déjà ", stream=False) == ([completion], streamed)
    assert asked(run_folder / "checkpoints" / "00000007", "déjà ") == ([completion], streamed)


def test_prompts_are_printed_in_order_each_with_its_completion(run_folder):
    completions, printed = asked(run_folder, "b", "", "a")
    assert printed == "".join(p + c.text + "\n" for p, c in zip(("b", "", "a"), completions, strict=True))
    alone = asked(run_folder, "a")[0]
    assert completions[2].tokens == alone[0].tokens and completions[2].text == alone[0].text


def test_weights_are_in_the_precision_of_the_run_or_in_the_one_asked_for(run_folder, tmp_path):
    half = write_run(tmp_path, "bfloat16")
    assert load(half)[0].embedding.get_value().dtype == jnp.bfloat16
    assert load(half, precision="float32")[0].embedding.get_value().dtype == jnp.float32
    assert load(run_folder)[0].embedding.get_value().dtype == jnp.float32


def test_a_stop_token_ends_a_completion_and_an_unknown_one_is_refused(run_folder):
    [free], _ = asked(run_folder, "a", sampling=Greedy(), max_new_tokens=40)
    at, end = next((i, t) for i, t in enumerate(free.tokens) if 32 < t < 127)  # a byte that is a character
    [cut], _ = asked(run_folder, "a", sampling=Greedy(), stop_tokens=(chr(end),), max_new_tokens=40)
    assert cut.tokens == free.tokens[: at + 1] and cut.finish == "eos"
    with pytest.raises(ConfigError, match="the tokenizer has no token '<|nothing|>'"):
        asked(run_folder, "a", stop_tokens=("<|nothing|>",))


def test_a_step_names_its_checkpoint(run_folder):
    texts = {step: asked(run_folder, "a", step=step, sampling=Greedy())[0][0].tokens for step in (5, 7, None)}
    assert texts[5] != texts[7] == texts[None]
    with pytest.raises(CheckpointError, match="no checkpoint of step 6; there are those of 5, 7"):
        load(run_folder, 6)


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_printed(run_folder):
    out = io.StringIO()
    with pytest.raises(ConfigError, match="context of 64"):
        run(GenerateConfig(model=str(run_folder), prompt=("x" * 60,)), out)
    assert out.getvalue() == ""

"""What files and users settle of an encoder-decoder's outputs: the same tokens as transformers."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from jaxllm.cli import main
from jaxllm.core.errors import ConfigError
from jaxllm.data.config import ByteTokenizer
from jaxllm.data.tokenizers import build
from jaxllm.generate import run
from jaxllm.inference.config import Beam, GenerateConfig, Greedy
from jaxllm.inference.generate import generate
from jaxllm.inference.output import Output
from jaxllm.pretrained import Texts, load_model, output_of, texts_of_checkpoint
from tests.data.test_unigrams import FIRST_THREE, trained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, EOS = 50, 2


def saved(folder: Path, vocab: int = V, **settled):
    """A random mBART of transformers, written to a folder; `settled` stands in its generation_config.json."""
    torch.manual_seed(0)
    model = transformers.MBartForConditionalGeneration(transformers.MBartConfig(
        vocab_size=vocab, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=40,
        forced_eos_token_id=None,
    )).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn_like(p) if p.ndim == 1 else torch.randn_like(p) * 0.5)
    for key, value in settled.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    return model


def said(model, ids: list[int], **asked) -> list[int]:
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), do_sample=False, **{"num_beams": 1, "max_new_tokens": 12} | asked)
    return out[0, 1:].tolist()


@pytest.mark.parametrize(
    ("sampling", "asked"),
    [
        (Greedy(), {}), (Greedy(repetition_penalty=1.5), {"repetition_penalty": 1.5}),
        (Beam(width=3), {"num_beams": 3, "early_stopping": False}),
    ],
    ids=["greedy", "penalty", "beam"],
)  # fmt: skip
def test_outputs_begin_end_and_lack_what_generation_config_says(sampling, asked, tmp_path):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, V, n).tolist() for n in (3, 8, 5)]
    free = saved(tmp_path / "free", decoder_start_token_id=EOS)
    common = max(range(V), key=[i for p in prompts for i in said(free, p)[1:-1]].count)
    model = saved(
        tmp_path / "settled", decoder_start_token_id=EOS, forced_bos_token_id=9, forced_eos_token_id=7,
        bad_words_ids=[[common]],
    )  # fmt: skip
    settled = output_of({p.name: p.read_bytes() for p in (tmp_path / "settled").glob("*.json")})
    assert settled == Output(start=EOS, first=9, last=7, never=(common,))
    ours = load_model(tmp_path / "settled")
    ask = functools.partial(generate, ours, sampling=sampling, eos_id=EOS, output=settled)
    for prompt, got in zip(prompts, ask(prompts, max_new_tokens=12), strict=True):
        assert list(got.tokens) == said(model, prompt, **asked)
        assert got.tokens[0] == 9 and common not in got.tokens
        assert (got.tokens[-1] == 7) == (len(got.tokens) == 12)
    assert [c.tokens for c in ask(prompts, max_new_tokens=1)] == [(7,)] * 3


def test_a_token_that_is_none_is_refused(tmp_path):
    saved(tmp_path, decoder_start_token_id=EOS)
    with pytest.raises(ConfigError, match="output.first=50 is no token of the model's vocabulary, 0 to 49"):
        generate(load_model(tmp_path), [[3]], max_new_tokens=1, output=Output(start=EOS, first=V))


def test_generate_writes_in_the_language_that_is_asked_for(tmp_path, capsys):
    trained(tmp_path / "sentencepiece.bpe.model", normalization_rule_name="identity", **FIRST_THREE)
    words = transformers.MBartTokenizer.from_pretrained(tmp_path)
    model = saved(tmp_path, len(words))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MBartTokenizer"}))
    text = "Return an object."
    read = words(text).input_ids
    ids = {code: words.convert_tokens_to_ids(code) for code in ("ro_RO", "de_DE")}
    wanted = {code: said(model, read, decoder_start_token_id=i) for code, i in ids.items()}
    assert wanted["ro_RO"] != wanted["de_DE"]
    ask = functools.partial(GenerateConfig, model=str(tmp_path), prompt=(text,), sampling=Greedy(), max_new_tokens=12)
    for code, tokens in wanted.items():
        [got] = run(ask(start_token=code))
        assert list(got.tokens) == tokens
        plain = words.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert got.text == plain and capsys.readouterr().out == plain + "\n"
    [got] = run(ask(start_token="</s>", first_token="ro_RO"))
    assert list(got.tokens) == said(model, read, decoder_start_token_id=EOS, forced_bos_token_id=ids["ro_RO"])
    capsys.readouterr()
    argv = ["generate", str(tmp_path), "--prompt", text, "--temperature", "0", "--max-new-tokens", "12"]
    assert main([*argv, "--start-token", "ro_RO"]) == 0
    plain = words.decode(wanted["ro_RO"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert capsys.readouterr().out == plain + "\n"
    with pytest.raises(ConfigError, match="model.start is not set, .* give start_token=TOKEN"):
        run(ask())
    with pytest.raises(ConfigError, match="start_token='ro': the tokenizer has no such token"):
        run(ask(start_token="ro"))


def test_a_checkpoint_keeps_what_is_settled(tmp_path):
    texts = Texts(build(ByteTokenizer()), (1,), (2,), {}, Output(start=2, first=9, never=(5, 6)))
    texts.save(tmp_path / "tokenizer")
    assert texts_of_checkpoint(tmp_path)[1:] == texts[1:]

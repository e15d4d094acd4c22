"""What tests beside transformers share: noise in all weights, a tokenizer of bytes, files that go back as they came."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.interop.folder import open_folder, save_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def randomised(model: Any, seed: int) -> Any:
    """The model, in evaluation mode, with noise in every weight that is learned: norms and biases too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        learned = [p for p in model.parameters() if p.requires_grad]
        for p in (*learned, *(b for n, b in model.named_buffers() if n == "final_logits_bias")):
            noise = torch.randn_like(p)
            p.copy_(p + 0.2 * noise if p.ndim == 1 else noise * p.shape[-1] ** -0.5)
    return model.eval()


def byte_tokenizer(folder: Path, single: str = "<s> $A", special: Sequence[str] = ("<s>", "</s>"), **more: str) -> int:
    """Saves a tokenizer of bytes after `special` tokens, which puts them around a text as `single` says; its size."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(list(special))
    around = [(token, vocab[token]) for token in special if token in single.split()]
    model.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=around)
    named = {"bos_token": "<s>", "eos_token": "</s>"} | more
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **named).save_pretrained(folder)
    return len(vocab)


def assert_same_tensors(model: Any, read: Any, folder: Path) -> Any:
    """Written by us: the same config, the same tensors to the bit; and, without its source, as transformers reads it."""
    dtypes = {n: np.dtype("float32") for n in read.weights}
    save_folder(folder / "back", read.cfg, read.weights.shapes, read.weights.__getitem__, dtypes, source=read.source)
    before, after = (open_folder(folder / side) for side in ("theirs", "back"))
    assert {n: (e.dtype, e.shape) for n, e in before.tensors.items()} == {
        n: (e.dtype, e.shape) for n, e in after.tensors.items()
    }
    for n in before.tensors:
        assert before.tensors.read(n).tobytes() == after.tensors.read(n).tobytes()
    assert before.source.files == after.source.files
    save_folder(folder / "new", read.cfg, read.weights.shapes, read.weights.__getitem__, dtypes, family=read.family)
    attention = model.config._attn_implementation
    again, info = type(model).from_pretrained(folder / "new", attn_implementation=attention, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return again

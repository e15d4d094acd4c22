"""Tokenizers: text to ids and back. The libraries are imported when a tokenizer of their kind is built or loaded."""

from collections.abc import Iterable
from pathlib import Path

from jaxllm.data import config
from jaxllm.data.tokenizers.base import Spec, StreamDecoder, Tokenizer, read_model, read_spec

__all__ = ["Spec", "StreamDecoder", "Tokenizer", "build", "from_config", "load"]


def build(cfg: config.Tokenizer, texts: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer that `cfg` describes, with its added tokens; `texts` is what the trained kinds learn from.

    Raises:
      DataError: for a model file that cannot be used, and for no text to train on.
      ConfigError: for a vocabulary that is too small, and for tokens that cannot be added.
    """
    return _built(cfg, texts).extend(cfg.add)


def from_config(cfg: config.Tokenizer) -> Tokenizer | None:
    """The tokenizer that `cfg` describes; None for one that is yet to be trained, checked as far as `cfg` tells.

    Raises:
      DataError, ConfigError: as `build` does.
    """
    if not cfg.kind.startswith("train_"):
        return build(cfg)
    from jaxllm.data.tokenizers.train import check

    return check(cfg)


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`."""
    folder = Path(folder)
    spec = read_spec(folder)
    kind = _kind(spec.kind)
    path = folder / (kind.file or "")
    return kind(spec, read_model(path) if kind.file else b"", str(path))


def _built(cfg: config.Tokenizer, texts: Iterable[str] | None) -> Tokenizer:
    match cfg:
        case config.ByteTokenizer():
            return _kind("byte")(Spec(kind="byte"))
        case config.HfTokenizer():
            from jaxllm.data.tokenizers import hf

            return hf.read(cfg.file, cfg.bos, cfg.eos)
        case config.SentencePieceTokenizer():
            return _kind("sentencepiece")(Spec(kind="sentencepiece"), read_model(cfg.file), cfg.file)
        case config.TiktokenTokenizer():
            spec = Spec(kind="tiktoken", encoding=cfg.encoding)
            return _kind("tiktoken")(spec, read_model(cfg.file), cfg.file)
        case _:
            from jaxllm.data.tokenizers.train import train

            assert texts is not None, f"{cfg.kind} learns from texts"
            return train(cfg, texts)


def _kind(name: str) -> type[Tokenizer]:
    match name:
        case "byte":
            from jaxllm.data.tokenizers.byte import Bytes as kind
        case "hf":
            from jaxllm.data.tokenizers.hf import HuggingFace as kind
        case "sentencepiece":
            from jaxllm.data.tokenizers.spm import SentencePiece as kind
        case "tiktoken":
            from jaxllm.data.tokenizers.ranks import Tiktoken as kind
    return kind

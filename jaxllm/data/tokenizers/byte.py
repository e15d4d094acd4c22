"""Bytes as ids: nothing to train, nothing unknown (ByT5, arXiv:2105.13626)."""

from collections.abc import Sequence

from jaxllm.data.tokenizers.base import Spec, Tokenizer

SPECIAL = {"<pad>": 256, "<bos>": 257, "<eos>": 258}


class Bytes(Tokenizer):
    """Id b is byte b; then <pad>, <bos>, <eos>."""

    def __init__(self, spec: Spec, data: bytes = b"", where: str = ""):
        super().__init__(spec, data, size=259, special=SPECIAL, bos="<bos>", eos="<eos>", pad="<pad>")

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def _bytes_of(self, i: int) -> bytes:
        return bytes([i])

    def _model_id(self, token: str) -> int | None:
        return token.encode()[0] if len(token.encode()) == 1 else None

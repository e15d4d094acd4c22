"""SentencePiece models (Kudo & Richardson 2018, arXiv:1808.06226), read by the sentencepiece library."""

from collections.abc import Sequence

from sentencepiece import SentencePieceProcessor

from jaxllm.core.errors import DataError
from jaxllm.data.tokenizers.base import Spec, Tokenizer


class SentencePiece(Tokenizer):
    """Control pieces are the special tokens. Around added tokens each stretch of text is encoded and decoded alone."""

    file = "tokenizer.model"
    lossless = False  # most models normalise spaces, all take U+2581 for one

    def __init__(self, spec: Spec, data: bytes, where: str = "tokenizer.model"):
        try:
            self._model = SentencePieceProcessor(model_proto=data)
            size = self._model.get_piece_size()
        except RuntimeError:
            size = 0
        if not size:
            raise DataError(f"{where}: not a SentencePiece model, or a truncated one; give the .model file")
        pieces = self._model.id_to_piece(list(range(size)))
        special = {piece: i for i, piece in enumerate(pieces) if self._model.is_control(i)}
        ids = (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())  # -1: the model has none
        bos, eos, pad = (pieces[i] if i >= 0 else None for i in ids)
        bos, eos, pad = spec.bos or bos, spec.eos or eos, spec.pad or pad
        super().__init__(spec, data, size=size, special=special, bos=bos, eos=eos, pad=pad)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def _bytes_of(self, i: int) -> bytes:
        piece = self._model.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if self._model.is_byte(i) else piece.replace("\u2581", " ").encode()

    def _model_id(self, token: str) -> int | None:
        i = self._model.piece_to_id(token)
        return i if self._model.id_to_piece(i) == token else None  # what is not there has the id of <unk>

"""seqio tasks and their mixture: text in, token ids out. The only module that imports seqio and TensorFlow.

Tasks are built, not registered: a second `prepare` in the same process meets no old names.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    """TensorFlow's import reports on CPU and CUDA straight to file descriptor 2, whatever its log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(nowhere)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _stderr_closed():
    import seqio
    import tensorflow as tf

BLOCK_TEXTS, BLOCK_BYTES = 1024, 2**20  # texts go to the tokenizer together, up to so many

with contextlib.suppress(RuntimeError):  # somebody used TensorFlow before: then it has what it has
    tf.config.set_visible_devices([], "GPU")


class TextTask(seqio.Task):
    """The seqio task of the texts `read(split)`, given as UTF-8.

    An example is a block of texts, as one text each would cost more than its tokens: `targets` are ragged rows of
    ids, EOS last, `bytes` the sizes of the texts.
    """

    def __init__(self, name: str, tokenizer: Any, read: Callable[[str], Iterable[bytes]]):
        self._errors: list[Exception] = []
        vocabulary = _Vocabulary(tokenizer, self._errors)
        super().__init__(
            name,
            seqio.FunctionDataSource(
                lambda split, shuffle_files: _dataset(functools.partial(_blocks, read, split, self._errors)),
                splits=("train", "validation"),
                caching_permitted=False,
            ),
            output_features={"targets": seqio.Feature(vocabulary, add_eos=tokenizer.eos_id is not None, rank=2)},
            preprocessors=[
                functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text", "bytes": "bytes"}),
                _tokenize,
                seqio.preprocessors.append_eos,
            ],
        )

    def examples(self, split: str) -> Iterator[tuple[np.ndarray, int]]:
        """(targets, bytes of text) of each text, in order. Errors of reading and tokenizing come out as they are."""
        try:
            for block in self.get_dataset(split=split, shuffle=False):
                ids, splits = block["targets"].values.numpy(), block["targets"].row_splits.numpy()
                for begin, end, size in zip(splits[:-1], splits[1:], block["bytes"].numpy().tolist(), strict=True):
                    yield ids[begin:end], size
        except tf.errors.OpError:
            if self._errors:
                raise self._errors[0] from None
            raise


def mixture(tasks: Iterable[TextTask], rates: Mapping[str, float]) -> seqio.Mixture:
    """The seqio mixture of tasks by rates."""
    return seqio.Mixture("mixture", [(task, rates[task.name]) for task in tasks])


class _Vocabulary(seqio.Vocabulary):
    """One of our tokenizers, which also takes a vector of texts at once: then the ids are ragged."""

    def __init__(self, tokenizer: Any, errors: list[Exception]):
        super().__init__()
        self._tokenizer, self._errors = tokenizer, errors

    bos_id = property(lambda self: self._tokenizer.bos_id)
    eos_id = property(lambda self: self._tokenizer.eos_id)
    unk_id = property(lambda self: None)
    _base_vocab_size = property(lambda self: self._tokenizer.vocab_size)

    def _encode(self, s):
        return self._tokenizer.encode(s)

    def _decode(self, ids):
        return self._tokenizer.decode(ids)

    def _encode_tf(self, s):
        ids, lengths = tf.numpy_function(self._encode_texts, [tf.reshape(s, [-1])], (tf.int32, tf.int64))
        ids, lengths = tf.ensure_shape(ids, [None]), tf.ensure_shape(lengths, [None])
        return tf.RaggedTensor.from_row_lengths(ids, lengths, validate=False) if s.shape.rank else ids

    def _decode_tf(self, ids):
        return tf.numpy_function(lambda x: self._tokenizer.decode(x.tolist()), [ids], tf.string)

    def _encode_texts(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids = self._tokenizer.encode_batch([text.decode() for text in texts])
        except Exception as e:
            self._errors.append(e)
            raise
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def _tokenize(dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]) -> tf.data.Dataset:
    """Blocks of texts as ragged ids. seqio's own runs 256 calls at once, which would hold 256 blocks in memory."""
    encode = output_features["targets"].vocabulary.encode_tf
    return dataset.map(lambda block: block | {"targets": encode(block["targets"])}).prefetch(2)


def _dataset(blocks: Callable[[], Iterator]) -> tf.data.Dataset:
    text, size = tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.int64)
    return tf.data.Dataset.from_generator(blocks, output_signature={"text": text, "bytes": size})


def _blocks(read: Callable[[str], Iterable[bytes]], split: str, errors: list[Exception]) -> Iterator[dict]:
    texts, size = [], 0
    try:
        for text in read(split):
            texts.append(text)
            size += len(text)
            if len(texts) == BLOCK_TEXTS or size >= BLOCK_BYTES:
                yield _block(texts)
                texts, size = [], 0
    except Exception as e:
        errors.append(e)
        raise
    if texts:
        yield _block(texts)


def _block(texts: list[bytes]) -> dict[str, np.ndarray]:
    return {"text": np.array(texts, object), "bytes": np.array([len(text) for text in texts], np.int64)}

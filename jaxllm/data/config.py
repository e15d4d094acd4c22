"""What `prepare` reads, how it tokenizes, and what it writes. No JAX, no TensorFlow here."""

from typing import Literal

from pydantic import Field, model_validator

from jaxllm.core.config import Config, union

# --- sources: where documents come from ------------------------------------------------------------------------


class TextFiles(Config):
    """Text files, plain or .gz, .xz, .zst; `{"kind": "text", "files": ["corpus/*.txt"]}`."""

    kind: Literal["text"] = "text"
    files: tuple[str, ...] = Field(min_length=1)  # paths or globs (`**` crosses folders), UTF-8
    document: Literal["file", "paragraph", "line"] = "file"  # what makes a document; paragraphs end at a blank line


class Jsonl(Config):
    """One JSON object a line, plain or .gz, .xz, .zst."""

    kind: Literal["jsonl"] = "jsonl"
    files: tuple[str, ...] = Field(min_length=1)  # paths or globs
    text: str = "text"  # the field that holds the text


class PythonSource(Config):
    """The .py files of the running interpreter's standard library or of an installed package, without tests."""

    kind: Literal["python"] = "python"
    package: str = "stdlib"  # `stdlib`, or the import name of a package


class HuggingFace(Config):
    """A folder written by `datasets.Dataset.save_to_disk`, or of Parquet files (extra: datasets)."""

    kind: Literal["huggingface"] = "huggingface"
    path: str  # the folder
    split: str | None = None  # of a DatasetDict
    text: str = "text"  # the column that holds the text


Source = union(TextFiles, Jsonl, PythonSource, HuggingFace)


# --- tokenizers --------------------------------------------------------------------------------------------------


class _Tokenizer(Config):
    add: tuple[str, ...] = ()  # tokens added at the end of the vocabulary; old ids stay

    @model_validator(mode="after")
    def _added_once(self):
        if len(set(self.add)) < len(self.add):
            raise ValueError(f"add holds a token twice: {sorted({t for t in self.add if self.add.count(t) > 1})}")
        return self


class ByteTokenizer(_Tokenizer):
    """256 bytes, then <pad>, <bos>, <eos>: nothing to train, nothing unknown (ByT5, arXiv:2105.13626)."""

    kind: Literal["byte"] = "byte"


class HfTokenizer(_Tokenizer):
    """A Hugging Face `tokenizer.json`."""

    kind: Literal["hf"] = "hf"
    file: str  # the file, or the folder that holds it
    bos: str | None = None  # beginning-of-document token; null: looked up beside the file, or none
    eos: str | None = None  # end-of-document token; null: likewise


class SentencePieceTokenizer(_Tokenizer):
    """A SentencePiece model file (Kudo & Richardson 2018, arXiv:1808.06226)."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    file: str  # the .model file


class TiktokenTokenizer(_Tokenizer):
    """A tiktoken rank file: base64 token and rank a line; .gz too."""

    kind: Literal["tiktoken"] = "tiktoken"
    file: str  # the .tiktoken file
    encoding: Literal[
        "gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base", "llama3", "qwen"
    ]  # its split pattern and special tokens


class _Trained(_Tokenizer):
    vocab: int = Field(gt=0)  # size of the vocabulary, special tokens included
    special: tuple[str, ...] = ("<pad>", "<bos>", "<eos>")  # special tokens, first in the vocabulary
    sample_mb: float = Field(100.0, gt=0)  # megabytes of training text to learn from, the first documents


class TrainBpe(_Trained):
    """Trains byte-level BPE (Sennrich et al. 2015, arXiv:1508.07909; GPT-2) on the training split."""

    kind: Literal["train_bpe"] = "train_bpe"


class TrainUnigram(_Trained):
    """Trains a Unigram model (Kudo 2018, arXiv:1804.10959) on the training split."""

    kind: Literal["train_unigram"] = "train_unigram"


class TrainWordPiece(_Trained):
    """Trains WordPiece (Devlin et al. 2018, arXiv:1810.04805) on the training split."""

    kind: Literal["train_wordpiece"] = "train_wordpiece"
    special: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # special tokens, first in the vocabulary
    lowercase: bool = True  # fold case and accents, as BERT-uncased does


Tokenizer = union(
    ByteTokenizer, HfTokenizer, SentencePieceTokenizer, TiktokenTokenizer, TrainBpe, TrainUnigram, TrainWordPiece
)


# --- tasks, mixture, prepare -------------------------------------------------------------------------------------


class Task(Config):
    """One named stream of documents, a seqio task."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")  # its name in the manifest and in mixtures
    source: Source  # where its documents come from
    weight: float | None = Field(None, gt=0)  # its rate, for `mixture: {kind: rates}`
    language: str | None = None  # its language, for `mixture: {kind: languages}`


class Rates(Config):
    """Each task by its own `weight` (one task needs none)."""

    kind: Literal["rates"] = "rates"


class Proportional(Config):
    """Rates are (training tokens)^(1/temperature), tokens capped at `maximum` (T5, arXiv:1910.10683, 3.5.2)."""

    kind: Literal["proportional"] = "proportional"
    temperature: float = Field(1.0, gt=0)  # 1: by size; towards infinity: all alike
    maximum: int | None = Field(None, gt=0)  # tokens beyond which a task counts no more


class Languages(Config):
    """Languages by (share of tokens)^alpha (XLM, arXiv:1901.07291; mT5: 0.3), tasks within a language by size."""

    kind: Literal["languages"] = "languages"
    alpha: float = Field(0.3, ge=0, le=1)  # 1: by size; 0: all alike


Mixture = union(Rates, Proportional, Languages)


class PrepareConfig(Config):
    """`jaxllm prepare`: from documents to packed shards and a manifest."""

    version: int = Field(1, ge=1)  # of this config format
    out: str  # the folder to write
    tasks: tuple[Task, ...] = Field(min_length=1)  # what to read
    mixture: Mixture = Rates()  # how tasks are mixed in training
    tokenizer: Tokenizer = ByteTokenizer()  # how text becomes ids
    length: int = Field(1024, gt=1)  # tokens in a row
    validation: float = Field(0.05, ge=0, lt=1)  # share held out, whole files (or documents, where a file holds many)
    split_long: bool = True  # documents longer than a row continue in the next; false: they are cut and counted
    shard_documents: int = Field(10_000, gt=0)  # documents that are packed together and share a shard
    max_document_mb: float = Field(32.0, gt=0)  # a longer document is an error, or skipped
    on_error: Literal["stop", "skip"] = "stop"  # unreadable files and records: stop with a message, or count and go on
    seed: int = 0  # of the held-out split

    @model_validator(mode="after")
    def _tasks_fit_mixture(self):
        names = [t.name for t in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks share a name: {sorted({n for n in names if names.count(n) > 1})}")
        if self.mixture.kind == "rates" and len(self.tasks) > 1 and any(t.weight is None for t in self.tasks):
            raise ValueError("mixture `rates` over several tasks needs a weight for each")
        if self.mixture.kind == "languages" and any(t.language is None for t in self.tasks):
            raise ValueError("mixture `languages` needs a language for each task")
        return self


# --- what training reads -----------------------------------------------------------------------------------------


class DataConfig(Config):
    """Prepared shards, as training reads them."""

    path: str  # the folder that `jaxllm prepare` wrote
    weights: tuple[tuple[str, float], ...] = ()  # (task, weight) pairs in place of the manifest's mixture
    prefetch: int = Field(2, ge=1)  # batches made ready ahead
    verify: bool = False  # check every shard's SHA-256 before the start

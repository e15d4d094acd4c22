"""What `generate`, `chat` and `embed` are asked. No JAX here."""

from typing import Annotated, Literal

from pydantic import Field

from jaxllm.core.config import Config, union


class Greedy(Config):
    """The most probable token."""

    kind: Literal["greedy"] = "greedy"
    repetition_penalty: float = Field(1.0, gt=0)  # divides positive, multiplies negative logits of seen tokens


class Sample(Config):
    """A draw, after temperature, top-k, top-p and min-p, applied in that order."""

    kind: Literal["sample"] = "sample"
    temperature: float = Field(1.0, gt=0)  # logits are divided by it
    top_k: int | None = Field(None, gt=0)  # keep the k most probable (Fan et al. 2018, arXiv:1805.04833)
    top_p: float | None = Field(None, gt=0, le=1)  # keep the nucleus (Holtzman et al. 2019, arXiv:1904.09751)
    min_p: float | None = Field(None, gt=0, le=1)  # keep p >= min_p * max p (Nguyen et al. 2024, arXiv:2407.01082)
    repetition_penalty: float = Field(1.0, gt=0)  # of seen tokens (CTRL, Keskar et al. 2019, arXiv:1909.05858)


class Beam(Config):
    """The sequence of highest log-probability / length^length_penalty among `width` kept."""

    kind: Literal["beam"] = "beam"
    width: int = Field(4, gt=1)  # beams
    length_penalty: float = Field(1.0, ge=0)  # exponent of the length (Wu et al. 2016, arXiv:1609.08144, section 7)


Sampling = union(Greedy, Sample, Beam)
Precision = Literal["float32", "bfloat16", "float16"]
Pool = Literal["mean", "cls", "last"]  # of what a model says of tokens: their mean, the first, the last


class ChatConfig(Config):
    """`jaxllm chat`: a conversation with a model."""

    version: int = Field(1, ge=1)  # of this config format
    model: str  # a run or one of its checkpoints, a Hugging Face folder, a GGUF file
    step: int | None = Field(None, ge=0)  # which checkpoint of a run; null: the newest
    turns: tuple[str, ...] = ()  # what the user says; none: is asked for in the terminal
    system: str | None = None  # the message that a conversation opens with; null: none, or the template's own
    template: str | None = None  # a .jinja file, or the name of one in configs/chat; null: the model's own
    max_new_tokens: int | None = Field(None, gt=0)  # longest answer; null: 512, or half the context if that is less
    sampling: Sampling = Sample(temperature=0.8, top_p=0.95)  # how tokens are chosen
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # texts that end an answer and are not part of it
    precision: Precision | None = None  # of weights and compute; null: as in training
    seed: int = Field(0, ge=0)  # of the draws
    compile_cache: bool = True  # keep compiled programs for the next start


class GenerateConfig(Config):
    """`jaxllm generate`: completions of prompts."""

    version: int = Field(1, ge=1)  # of this config format
    model: str  # a run or one of its checkpoints, a Hugging Face folder, a GGUF file
    step: int | None = Field(None, ge=0)  # which checkpoint of a run; null: the newest
    prompt: tuple[str, ...] = Field(min_length=1)  # texts to continue, as one batch
    max_new_tokens: int = Field(64, gt=0)  # longest completion
    sampling: Sampling = Sample(temperature=0.8, top_p=0.95)  # how tokens are chosen
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # texts that end a completion and are not part of it
    stop_tokens: tuple[str, ...] = ()  # tokens that end a completion as the end-of-document token does: <|eot_id|>
    start_token: str | None = None  # what an encoder-decoder's outputs begin with (mBART: en_XX); null: as files say
    first_token: str | None = None  # what is said first in any case (mBART-50: en_XX); null: as files say
    precision: Precision | None = None  # of weights and compute; null: as in training
    seed: int = Field(0, ge=0)  # of the draws
    stream: bool = True  # print tokens as they come (one prompt)


class EmbedConfig(Config):
    """`jaxllm embed`: vectors of texts. What is null is as a folder of sentence-transformers says, or as said here."""

    version: int = Field(1, ge=1)  # of this config format
    model: str  # a run or one of its checkpoints, a Hugging Face folder, a GGUF file
    step: int | None = Field(None, ge=0)  # which checkpoint of a run; null: the newest
    text: tuple[str, ...] = ()  # texts, each of which gets a vector
    file: str | None = None  # a file of more of them, one a line
    out: str | None = None  # a *.npy file for float32 [texts, width]; null: a list a line, printed
    batch: int = Field(32, gt=0)  # texts computed at once; changes no vector
    pool: Pool | None = None  # what becomes the vector; null: the mean over all tokens
    normalise: bool | None = None  # vectors of length 1; null: true
    max_tokens: int | None = Field(None, gt=0)  # longer texts are cut; null: the model's context
    precision: Precision | None = None  # of weights and compute; null: as in training, or as stored

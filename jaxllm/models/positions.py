"""The grammar of positions: how a model is told the order of its tokens. Needs no JAX; see `models.config`."""

import math
from typing import Literal

from pydantic import Field, model_validator

from jaxllm.core.config import Config, union


class NoPosition(Config):
    """No position signal but the causal mask (Kazemnejad et al. 2023, arXiv:2305.19466)."""

    kind: Literal["none"] = "none"


class Sinusoidal(Config):
    """Fixed sines and cosines added to the embedding (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    base: float = Field(10_000.0, gt=0)  # longest wavelength is 2 pi times this
    halves: bool = False  # all sines, then all cosines (tensor2tensor, CTRL, XGLM); else in turn
    reaches_base: bool = False  # the last wavelength is the longest (tensor2tensor, XGLM), not the one after it
    offset: int = Field(0, ge=0)  # the first token stands at this position (XGLM: 2)


class Learned(Config):
    """A learned vector per position, `context` of them (Radford et al. 2019, GPT-2)."""

    kind: Literal["learned"] = "learned"
    offset: int = Field(0, ge=0)  # rows before that of the first token, which nothing looks up (OPT: 2)


# --- rotary ------------------------------------------------------------------------------------------------------


class Interpolated(Config):
    """Positions divided by `factor` (position interpolation, Chen et al. 2023, arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(ge=1)  # how much longer than in training


class NTK(Config):
    """theta * factor^(d / (d - 2)): high frequencies stay, low ones stretch (bloc97 2023; arXiv:2309.00071, eq. 16)."""

    kind: Literal["ntk"] = "ntk"
    factor: float = Field(ge=1)  # how much longer than in training


class DynamicNTK(Config):
    """NTK with the factor that a document's length asks for, beyond `original` (arXiv:2309.00071, appendix B.1).

    theta * (factor * length / original - (factor - 1))^(d / (d - 2)). A longer document turns all of its keys anew, in
    generation, too.
    """

    kind: Literal["dynamic_ntk"] = "dynamic_ntk"
    factor: float = Field(ge=1)  # growth of the factor with the length
    original: int = Field(gt=0)  # longest length that is left as it is
    doubling: bool = False  # a longer length counts as the next of 2, 4, 8, ... times `original` (Qwen 1)


class YaRN(Config):
    """High frequencies as trained, low ones interpolated, a ramp between (Peng et al. 2023, arXiv:2309.00071)."""

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)  # how much longer than in training
    original: int = Field(gt=0)  # length in training
    beta_fast: float = Field(32.0, gt=0)  # turns within `original` from which a frequency stays
    beta_slow: float = Field(1.0, gt=0)  # turns up to which it is interpolated
    attention: float | None = Field(None, gt=0)  # multiplies sines and cosines; null: 0.1 ln(factor) + 1
    truncate: bool = True  # the ramp begins and ends at whole dimensions

    @property
    def temperature(self) -> float:
        return self.attention or 0.1 * math.log(self.factor) + 1


class Llama3(Config):
    """Wavelengths beyond original / low divided by `factor`, a ramp to those below original / high (arXiv:2407.21783).

    The formula is that of the models' published code.
    """

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1)  # of the longest wavelengths
    low: float = Field(1.0, gt=0)  # turns within `original` up to which a frequency is divided
    high: float = Field(4.0, gt=0)  # turns from which it stays
    original: int = Field(gt=0)  # length in training

    @model_validator(mode="after")
    def _ramp(self):
        if self.high <= self.low:
            raise ValueError(f"high={self.high} must be more than low={self.low}")
        return self


class LongRoPE(Config):
    """Each frequency divided by a searched factor: one set to `original` tokens, one beyond (arXiv:2402.13753).

    A generation that passes `original` turns all keys anew; what layers made of earlier tokens stays.
    """

    kind: Literal["longrope"] = "longrope"
    short: tuple[float, ...]  # divisors for documents of at most `original` tokens
    long: tuple[float, ...]  # divisors for longer ones
    original: int = Field(gt=0)  # length in training
    attention: float = Field(1.0, gt=0)  # multiplies sines and cosines

    @property
    def temperature(self) -> float:
        return self.attention


Scaling = union(Interpolated, NTK, DynamicNTK, YaRN, Llama3, LongRoPE)


class RoPE(Config):
    """Rotary embedding of queries and keys (Su et al. 2021, arXiv:2104.09864)."""

    kind: Literal["rope"] = "rope"
    theta: float = Field(10_000.0, gt=0)  # base of the geometric series of wavelengths
    fraction: float = Field(1.0, gt=0, le=1)  # share of each head that is rotated (GPT-NeoX: 0.25)
    interleaved: bool = False  # pairs are (0,1),(2,3).. as in the paper and GPT-J; else halves, as in LLaMA
    scaling: Scaling | None = None  # for more tokens than in training
    xpos: float | None = Field(None, gt=0)  # tokens over which products decay (Sun et al. 2022, 2212.10554: 512)

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on how long a document is."""
        return self.scaling is not None and self.scaling.kind in ("dynamic_ntk", "longrope")


class RoPE2D(Config):
    """Half of each head rotated by the place in the prompt, half by the place in the span that is filled in.

    GLM (Du et al. 2021, arXiv:2103.10360, section 2.1), as rotations: ChatGLM-6B. The prompt is a document's prefix. In
    a span the first place is that of its mask, in what is generated that of the prompt's last token; the second counts
    from 1, and is 0 in the prompt.
    """

    kind: Literal["rope_2d"] = "rope_2d"
    theta: float = Field(10_000.0, gt=0)  # base of the geometric series of wavelengths

    @property
    def fraction(self) -> float:
        return 1.0

    @property
    def interleaved(self) -> bool:
        return False

    @property
    def by_length(self) -> bool:
        return False


class ALiBi(Config):
    """A penalty on the logits, linear in distance, one slope a head (Press et al. 2021, arXiv:2108.12409)."""

    kind: Literal["alibi"] = "alibi"
    steepest: float = Field(8.0, gt=0)  # slopes fall to 2 to the minus this (MPT: alibi_bias_max)
    order: Literal["paper", "odd_first"] = "paper"  # where heads are no power of two; odd_first: as MPT has it
    scale: float = Field(1.0, gt=0)  # multiplies the penalty (Falcon: head_dim^(-1/2))
    rounded: bool = False  # slope times key position in bfloat16, whatever computes (Falcon)


Position = union(NoPosition, Sinusoidal, Learned, RoPE, RoPE2D, ALiBi)
LayerPosition = union(NoPosition, RoPE, RoPE2D, ALiBi)  # what a layer may say for itself


# --- what distance adds to the logits of attention -----------------------------------------------------------------


class T5Buckets(Config):
    """A learned scalar per head and bucket of distances, wider with distance (Raffel et al. 2019, arXiv:1910.10683, 2.1).

    Half of the buckets are exact; the rest grow logarithmically up to `max_distance`, and all beyond share the last.
    """

    kind: Literal["t5"] = "t5"
    buckets: int = Field(32, gt=1)  # of distances, of both directions together
    max_distance: int = Field(128, gt=1)  # from which on all distances share a bucket
    bidirectional: bool = False  # half of the buckets are for tokens that follow (encoders)
    shared: bool = True  # one table for all layers; else each its own (UMT5, arXiv:2304.09151)

    @model_validator(mode="after")
    def _room(self):
        exact = self.buckets // (4 if self.bidirectional else 2)
        if self.buckets % (4 if self.bidirectional else 2) or self.max_distance <= exact:
            raise ValueError(
                f"buckets={self.buckets} must be a multiple of {4 if self.bidirectional else 2}, and "
                f"max_distance={self.max_distance} more than the {exact} distances that have a bucket of their own"
            )
        return self


class Kerple(Config):
    """-a log(1 + b |i - j|) or -a |i - j|^b, learned per head (Chi et al. 2022, arXiv:2205.09921, equations 2 and 3)."""

    kind: Literal["kerple"] = "kerple"
    form: Literal["log", "power"] = "log"  # power keeps 0 < b <= 2
    shared: bool = False  # one pair per head for all layers


class SandwichBias(Config):
    """Products of sinusoids of distance, less their largest, a scale per head (Chi et al. 2022, arXiv:2212.10356, 4)."""

    kind: Literal["sandwich"] = "sandwich"
    size: int = Field(128, gt=1)  # of the sinusoids, an even number: the paper's d'
    steepest: float = Field(8.0, gt=0)  # head h of N is scaled by steepest * h / N
    shared: Literal[True] = True  # there is nothing to learn


class Fire(Config):
    """f(psi(i - j) / psi(max(i, L))), psi(x) = log(c x + 1), f a small network (Li et al. 2023, arXiv:2310.04418, 3)."""

    kind: Literal["fire"] = "fire"
    hidden: int = Field(32, gt=0)  # width of the network's hidden layer
    threshold: float = Field(512.0, gt=0)  # L starts here
    shared: bool = False  # one network for all layers (FIRE-S)


class Tisa(Config):
    """sum_s a_s exp(-|b_s| (j - i - c_s)^2), learned per head (Wennberg & Henter 2021, arXiv:2106.01950, equation 5)."""

    kind: Literal["tisa"] = "tisa"
    kernels: int = Field(5, gt=0)  # bumps per head
    shared: bool = False  # the same for all layers


class Shaw(Config):
    """Learned vectors per clipped distance, added to keys and to values (Shaw et al. 2018, arXiv:1803.02155, 3.1)."""

    kind: Literal["shaw"] = "shaw"
    clip: int = Field(16, gt=0)  # distances beyond are as this one
    values: bool = True  # of values, too
    shared: bool = False  # the same for all layers


class XL(Config):
    """(q + v) W r(i - j) + u k, r a sinusoid (Dai et al. 2019, arXiv:1901.02860, section 3.3; Gopher, 2112.11446).

    With `segments` also (q + s) e, e one of two vectors a head: of tokens of one segment, and of two (Yang et al. 2019,
    arXiv:1906.08237, section 2.5).
    """

    kind: Literal["xl"] = "xl"
    shared_biases: bool = False  # u and v are the same in all layers
    segments: bool = False  # whether two tokens are of one segment is told, too (XLNet)


class Disentangled(Config):
    """Content to position and position to content (He et al. 2020, arXiv:2006.03654, equation 4)."""

    kind: Literal["disentangled"] = "disentangled"
    span: int = Field(512, gt=0)  # distances at or beyond are as this one
    buckets: int | None = Field(None, gt=1)  # of distances, logarithmic beyond half of them (v2, v3: 256); null: each
    content_to_position: bool = True  # products of queries and of what distances say as keys
    position_to_content: bool = True  # products of keys and of what distances say as queries
    own_projections: bool = True  # of positions; else those of queries and keys project them, too (v2, v3)
    norm: bool = False  # layer norm of the table of positions (v2, v3)


Relative = union(T5Buckets, Kerple, SandwichBias, Fire, Tisa, Shaw, XL, Disentangled)

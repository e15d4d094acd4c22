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

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on how long a document is."""
        return self.scaling is not None and self.scaling.kind in ("dynamic_ntk", "longrope")


class ALiBi(Config):
    """A penalty on the logits, linear in distance, one slope a head (Press et al. 2021, arXiv:2108.12409)."""

    kind: Literal["alibi"] = "alibi"
    steepest: float = Field(8.0, gt=0)  # slopes fall to 2 to the minus this (MPT: alibi_bias_max)
    order: Literal["paper", "odd_first"] = "paper"  # where heads are no power of two; odd_first: as MPT has it
    scale: float = Field(1.0, gt=0)  # multiplies the penalty (Falcon: head_dim^(-1/2))
    rounded: bool = False  # slope times key position in bfloat16, whatever computes (Falcon)


Position = union(NoPosition, Sinusoidal, Learned, RoPE, ALiBi)
LayerPosition = union(NoPosition, RoPE, ALiBi)  # what a layer may say for itself

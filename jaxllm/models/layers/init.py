"""Standard deviations of freshly made weights, by scheme and by the role of the weight."""

import math
from typing import Literal, NamedTuple

from jaxllm.models.config import Block, Stack

Role = Literal["embedding", "hidden", "residual", "head"]


class Weight(NamedTuple):
    """What a scheme may look at: fan-in and fan-out in elements, and what the weight is for.

    `residual` are the projections that write into the residual stream (attention output, FFN down).
    """

    role: Role
    fan_in: int
    fan_out: int


def std(cfg: Stack, weight: Weight) -> float:
    """Standard deviation that `cfg.init` gives a weight; sources stand with the scheme's config."""
    init = cfg.init
    match init.kind:
        case "fan_in":
            if weight.role != "embedding":
                return math.sqrt(init.scale / weight.fan_in)
            return init.embedding or (
                cfg.embed**-0.5 if getattr(cfg, "tie", True) else 1.0
            )  # a tied head wants logits of unit variance
        case "normal":
            return init.std / (
                math.sqrt(2 * cfg.num_layers) if weight.role == "residual" and init.scale_residual else 1.0
            )
        case "small":
            return (
                2 / (cfg.num_layers * math.sqrt(cfg.embed))
                if weight.role == "residual"
                else math.sqrt(2 / (5 * cfg.embed))
            )
        case "xavier":
            return cfg.embed**-0.5 if weight.role == "embedding" else math.sqrt(2 / (weight.fan_in + weight.fan_out))
    raise AssertionError(init.kind)


def gain(cfg: Stack, block: Block) -> float:
    """Factor on value, output and feed-forward weights that the placement's paper asks for."""
    match block.placement.kind:
        case "deepnorm":
            return cfg.deepnorm_beta
        case "subln":  # Magneto, arXiv:2210.06423, figure 2, decoder-only: sqrt(log 2L)
            return math.sqrt(math.log(2 * cfg.num_layers))
    return 1.0

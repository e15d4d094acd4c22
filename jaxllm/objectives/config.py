"""What is minimised."""

from typing import Literal

from pydantic import Field

from jaxllm.core.config import Config, union


class Routers(Config):
    """What routers of mixtures add to the loss, each times its mean over mixtures and tokens; nothing without any.

    Switch adds its layers up instead: its 0.01 is `balance` divided by the number of mixtures. Means are of the tokens
    of a microbatch.
    """

    balance: float = Field(0.01, ge=0)  # times E sum f_e P_e (Switch, arXiv:2101.03961, section 2.2): 1 if used evenly
    z_loss: float = Field(1e-3, ge=0)  # times log(sum of exp)^2 of router logits (ST-MoE, arXiv:2202.08906, section 3)


class NextToken(Config):
    """Cross-entropy of the next token."""

    kind: Literal["next_token"] = "next_token"
    z_loss: float = Field(0.0, ge=0)  # adds this times log(Z)^2 (PaLM, arXiv:2204.02311, section 5: 1e-4)
    routers: Routers = Routers()  # what keeps the experts of mixtures evenly used
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # share of the target spread over the vocabulary (1512.00567)


Objective = union(NextToken)

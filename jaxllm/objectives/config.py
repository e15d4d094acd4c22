"""What is minimised."""

from typing import Literal

from pydantic import Field

from jaxllm.core.config import Config, union


class NextToken(Config):
    """Cross-entropy of the next token."""

    kind: Literal["next_token"] = "next_token"
    z_loss: float = Field(0.0, ge=0)  # adds this times log(Z)^2 (PaLM, arXiv:2204.02311, section 5: 1e-4)
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # share of the target spread over the vocabulary (1512.00567)


Objective = union(NextToken)

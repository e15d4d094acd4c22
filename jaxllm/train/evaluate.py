"""Held-out loss, perplexity, bits per byte and token accuracy."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxllm.models.module import Params
from jaxllm.train.step import Setup, place_batch


def evaluate(setup: Setup, eval_step: Callable, params: Params, rows: Sequence[dict]) -> dict[str, float]:
    """`validation_*` metrics over all `rows` (packed rows as the loader gives them), weighted by tokens.

    loss in nats a token, perplexity = exp(cross-entropy), bits_per_byte of the rows' text. The last batch is filled
    up with rows of weight 0, so one program serves all.
    """
    size = setup.cfg.batch
    host, hosts = jax.process_index(), jax.process_count()
    totals: dict[str, np.ndarray] = {}
    for first in range(0, len(rows), size):
        part = [rows[i] for i in range(first, min(first + size, len(rows)))]
        part += [{k: np.zeros_like(v) for k, v in part[0].items()}] * (size - len(part))
        mine = part[size * host // hosts : size * (host + 1) // hosts]
        batch = {k: np.stack([row[k] for row in mine]) for k in mine[0]}
        sums = jax.device_get(eval_step(params, place_batch(setup, batch)))
        for name, pair in sums.items():
            totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
    mean = {name: float(s / w) if w else math.nan for name, (s, w) in totals.items()}
    return {
        "validation_loss": mean["loss"],
        "validation_perplexity": math.exp(min(mean["xent"], 700.0)),  # exp(700) is the last float64
        "validation_bits_per_byte": mean["bits_per_byte"],
        "validation_accuracy": mean["accuracy"],
    }

"""Held-out loss, perplexity, bits per byte and token accuracy."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxllm.models.module import Params
from jaxllm.train.step import Setup, local_rows, place_batch


def evaluate(
    setup: Setup, eval_step: Callable, params: Params, rows: Sequence[dict], stopped: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """`validation_*` metrics over all `rows` (packed rows as the loader gives them), weighted by tokens.

    loss in nats a token, perplexity = exp(cross-entropy), bits_per_byte of the rows' text. Batches are as large as
    microbatches of training; the last is filled up with rows of weight 0, so one program serves all. None if `stopped`
    says so on the way.
    """
    size = setup.cfg.batch // setup.cfg.accumulate
    mine = local_rows(setup, size)
    nothing = {k: np.zeros_like(v) for k, v in rows[0].items()}
    totals: dict[str, np.ndarray] = {}
    for first in range(0, len(rows), size):
        if stopped():
            return None
        part = [rows[first + i] if first + i < len(rows) else nothing for i in mine]
        batch = {k: np.stack([row[k] for row in part]) for k in nothing}
        sums = jax.device_get(eval_step(params, place_batch(setup, batch, size)))
        for name, pair in sums.items():
            totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
    mean = {name: float(s / w) if w else math.nan for name, (s, w) in totals.items()}
    return {
        "validation_loss": mean["loss"],
        "validation_perplexity": math.exp(min(mean["xent"], 700.0)),  # exp(700) is the last float64
        "validation_bits_per_byte": mean["bits_per_byte"],
        "validation_accuracy": mean["accuracy"],
    }

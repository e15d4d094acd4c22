"""Learning rates by step. Steps count from 0: the first update uses the value at 0, the last the value at steps - 1."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from jaxllm.core.errors import ConfigError
from jaxllm.train.config import WSD, Constant, Cosine, InverseSqrt, Linear, Schedule


def learning_rate(cfg: Schedule, peak: float, steps: int) -> optax.Schedule:
    """Step (int or int array) -> float32 learning rate; never 0 at the first step, exactly the floor at the last.

    Warmup: step k gets (k + 1) / warmup of the peak, so step 0 already moves the weights; steps warmup - 1 and
    `warmup` get the peak. Decays run from the peak at their first step to floor * peak at step steps - 1 and stay
    there. A decay of one step has room for one of its ends only, and stays at the peak.

    Raises:
      ConfigError: warmup leaves no step after it, or the phases of a WSD overlap, or it has no exponential to a floor of 0.
    """
    if cfg.warmup >= steps:
        raise ConfigError(
            f"schedule.warmup={cfg.warmup} leaves none of the {steps} steps for the peak;"
            f" set schedule.warmup below steps={steps}, or raise steps"
        )
    share = _after_warmup(cfg, steps)

    def schedule(step):
        k = jnp.asarray(step)
        rising = (k + 1) / max(cfg.warmup, 1)
        return (peak * jnp.where(k < cfg.warmup, rising, share(k))).astype(jnp.float32)

    return schedule


def _after_warmup(cfg: Schedule, steps: int) -> Callable:
    """Step -> share of the peak, for steps from `warmup` on."""
    match cfg:
        case Constant():
            return lambda k: jnp.ones_like(k, jnp.float32)
        case Cosine(floor=floor, warmup=first):
            return _decay(lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)), floor, first, steps)
        case Linear(floor=floor, warmup=first):
            return _decay(lambda x: 1 - x, floor, first, steps)
        case WSD():
            return _decay(_wsd_shape(cfg), cfg.floor, _wsd_first(cfg, steps), steps)
        case InverseSqrt(warmup=warmup):
            return lambda k: jnp.sqrt(warmup / jnp.maximum(k, warmup))
    raise AssertionError(cfg)


def _decay(shape: Callable, floor: float, first: int, steps: int) -> Callable:
    """`shape` takes progress 0..1 to 1..0; the result runs from 1 at `first` to `floor` at the last step."""

    def share(k):
        progress = jnp.clip((k - first) / max(steps - 1 - first, 1), 0, 1)
        s = shape(progress)
        return s + floor * (1 - s)  # this form is exact at both ends, floor + (1 - floor) s is not

    return share


def _wsd_shape(cfg: WSD) -> Callable:
    if cfg.shape == "linear":
        return lambda x: 1 - x
    if cfg.shape == "sqrt":
        return lambda x: 1 - jnp.sqrt(x)
    if cfg.floor == 0:
        raise ConfigError("schedule.shape=exponential never reaches schedule.floor=0; set a floor above 0 (say 0.01)")
    # floor^x falls by an equal factor each step; _decay spans 1..floor, so it wants it stretched to 1..0
    return lambda x: (cfg.floor**x - cfg.floor) / (1 - cfg.floor) if cfg.floor < 1 else jnp.ones_like(x)


def _wsd_first(cfg: WSD, steps: int) -> int:
    """First step of the decay, still at the peak. Two steps at least: a decay has two ends."""
    decay = min(max(round(cfg.decay * steps), 2), steps)
    if cfg.warmup + decay > steps:
        raise ConfigError(
            f"schedule: warmup={cfg.warmup} and a decay of {decay} steps (decay={cfg.decay} of steps={steps}) overlap;"
            f" set warmup to at most {steps - decay}, or decay to at most {(steps - cfg.warmup) / steps:g}"
        )
    return steps - decay

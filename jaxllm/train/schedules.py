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
      ConfigError: no step is left after the warmup, the phases of a WSD overlap, or it decays exponentially to 0.
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
        case Cosine():
            return _decay(_to_floor(lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)), cfg.floor), cfg.warmup, steps)
        case Linear():
            return _decay(_to_floor(lambda x: 1 - x, cfg.floor), cfg.warmup, steps)
        case WSD():
            return _decay(_wsd_curve(cfg), _wsd_first(cfg, steps), steps)
        case InverseSqrt():
            return lambda k: jnp.sqrt(cfg.warmup / jnp.maximum(k, cfg.warmup))
    raise AssertionError(cfg)


def _decay(curve: Callable, first: int, steps: int) -> Callable:
    """`curve` takes progress, 0 at step `first` and 1 at the last, to a share of the peak."""
    return lambda k: curve(jnp.clip((k - first) / max(steps - 1 - first, 1), 0, 1))


def _to_floor(shape: Callable, floor: float) -> Callable:
    """A fall from 1 to 0 squeezed into 1 to `floor`."""

    def curve(x):
        s = shape(x)
        return s + floor * (1 - s)  # exact at both ends, which floor + (1 - floor) * s is not

    return curve


def _wsd_curve(cfg: WSD) -> Callable:
    if cfg.shape == "linear":
        return _to_floor(lambda x: 1 - x, cfg.floor)
    if cfg.shape == "sqrt":
        return _to_floor(lambda x: 1 - jnp.sqrt(x), cfg.floor)
    if cfg.floor == 0:
        raise ConfigError("schedule.shape=exponential never reaches schedule.floor=0; set a floor above 0 (say 0.01)")
    return lambda x: cfg.floor**x  # falls by an equal factor each step


def _wsd_first(cfg: WSD, steps: int) -> int:
    """First step of the decay, still at the peak. Two steps at least: a decay has two ends."""
    decay = min(max(round(cfg.decay * steps), 2), steps)
    if cfg.warmup + decay > steps:
        raise ConfigError(
            f"schedule: warmup={cfg.warmup} and a decay of {decay} steps (decay={cfg.decay} of steps={steps}) overlap;"
            f" set warmup to at most {steps - decay}, or decay to at most {(steps - cfg.warmup) / steps:g}"
        )
    return steps - decay

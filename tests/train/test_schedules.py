import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import ConfigError
from jaxllm.train.config import WSD, Constant, Cosine, InverseSqrt, Linear
from jaxllm.train.schedules import learning_rate

PEAK = 3e-4
STEPS = 1000
EVERY = [
    Constant(warmup=40),
    Cosine(warmup=40, floor=0.1),
    Linear(warmup=40, floor=0.05),
    *(WSD(warmup=40, decay=0.2, floor=0.01, shape=s) for s in ("linear", "sqrt", "exponential")),
    InverseSqrt(warmup=40),
]
DECAYING = [cfg for cfg in EVERY if hasattr(cfg, "floor")]


def values(cfg, steps=STEPS) -> np.ndarray:
    return np.asarray(learning_rate(cfg, PEAK, steps)(jnp.arange(steps)))


def name(cfg) -> str:
    return f"{cfg.kind}-{getattr(cfg, 'shape', '')}".strip("-")


@pytest.mark.parametrize("cfg", EVERY, ids=name)
def test_warmup_rises_in_equal_steps_from_a_first_step_that_is_not_lost(cfg):
    lr = values(cfg)
    np.testing.assert_allclose(lr[:40], PEAK * np.arange(1, 41) / 40, rtol=1e-6)
    assert lr[39] == lr[40] == np.float32(PEAK)
    assert lr.max() == np.float32(PEAK)


@pytest.mark.parametrize("cfg", EVERY, ids=name)
def test_without_warmup_the_first_step_is_at_the_peak(cfg):
    if not isinstance(cfg, InverseSqrt):
        assert values(cfg.model_copy(update={"warmup": 0}))[0] == np.float32(PEAK)


@pytest.mark.parametrize("cfg", DECAYING, ids=name)
def test_the_last_step_is_exactly_at_the_floor_and_what_follows_stays_there(cfg):
    schedule = learning_rate(cfg, PEAK, STEPS)
    floor = np.float32(PEAK) * np.float32(cfg.floor)
    np.testing.assert_allclose(float(schedule(STEPS - 1)), floor, rtol=2e-7)
    assert schedule(STEPS - 1) == schedule(STEPS) == schedule(10 * STEPS)


@pytest.mark.parametrize("cfg", EVERY, ids=name)
def test_after_the_warmup_the_rate_never_rises(cfg):
    assert (np.diff(values(cfg)[40:]) <= 0).all()


@pytest.mark.parametrize("cfg", EVERY, ids=name)
def test_a_schedule_is_the_same_under_jit_for_python_steps_and_for_arrays(cfg):
    schedule = learning_rate(cfg, PEAK, STEPS)
    for step in (0, 17, 40, 555, 999):
        assert schedule(step).dtype == jnp.float32
        np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), schedule(step), rtol=1e-6)


def test_cosine_is_half_way_between_peak_and_floor_in_the_middle():
    lr = values(Cosine(warmup=0, floor=0.1), steps=1001)
    assert lr[500] == pytest.approx(PEAK * 0.55, rel=1e-6)
    assert lr[250] == pytest.approx(PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))), rel=1e-6)


def test_wsd_is_stable_until_the_share_that_decays():
    lr = values(WSD(warmup=10, decay=0.2, floor=0.0))
    assert (lr[10:801] == np.float32(PEAK)).all()
    assert lr[801] < lr[800]
    assert lr[-1] == 0


@pytest.mark.parametrize(
    "shape, middle", [("linear", 0.5 + 0.5 * 0.04), ("sqrt", 1 - 0.96 * math.sqrt(0.5)), ("exponential", 0.2)]
)
def test_the_shapes_of_wsd_differ_in_the_middle_of_the_decay(shape, middle):
    lr = values(WSD(decay=0.101, floor=0.04, shape=shape))  # 101 steps: 899..999, the middle is step 949
    assert lr[949] == pytest.approx(PEAK * middle, rel=1e-5)


def test_an_exponential_decay_falls_by_the_same_factor_each_step():
    lr = values(WSD(decay=0.5, floor=0.01, shape="exponential"))[500:]
    np.testing.assert_allclose(lr[1:] / lr[:-1], 0.01 ** (1 / 499), rtol=1e-5)


def test_inverse_sqrt_is_the_formula_of_the_transformer_paper():
    """Vaswani et al. 2017, equation 3: proportional to min(n^-1/2, n warmup^-3/2)."""
    lr = values(InverseSqrt(warmup=100), steps=5000)
    n = np.arange(100, 5000)
    np.testing.assert_allclose(lr[100:], PEAK * np.sqrt(100) * np.minimum(n**-0.5, n * 100**-1.5), rtol=1e-5)


@pytest.mark.parametrize("cfg", EVERY, ids=name)
def test_a_warmup_as_long_as_the_run_is_refused(cfg):
    with pytest.raises(ConfigError, match="warmup=40.*40 steps"):
        learning_rate(cfg, PEAK, 40)


def test_a_wsd_whose_phases_overlap_is_refused_with_what_would_fit():
    with pytest.raises(ConfigError, match="warmup to at most 100, or decay to at most 0.8"):
        learning_rate(WSD(warmup=200, decay=0.9), PEAK, STEPS)


def test_an_exponential_decay_to_nothing_is_refused():
    with pytest.raises(ConfigError, match="floor above 0"):
        learning_rate(WSD(shape="exponential"), PEAK, STEPS)


@pytest.mark.parametrize("cfg", [Constant(), Cosine(), Linear(), WSD()], ids=name)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_finite_rates_that_start_at_the_peak(cfg, steps):
    lr = values(cfg, steps)
    assert np.isfinite(lr).all()
    assert lr[0] == np.float32(PEAK)

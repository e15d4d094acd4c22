import json

import numpy as np
import pytest

from jaxllm.train.config import Stability
from jaxllm.train.stability import SpikeDetector


def curve(steps: int, noise: float, seed: int) -> np.ndarray:
    """A loss as in language modelling: a fast exponential fall, then a power law; noise that shrinks with the loss."""
    t = np.arange(steps)
    trend = 1.8 + 6 * np.exp(-t / 150) + 3 * (1 + t / 50) ** -0.4
    return trend * (1 + noise * np.random.default_rng(seed).normal(size=steps))


def hits(cfg: Stability, losses) -> list[int]:
    detector = SpikeDetector(cfg)
    return [i for i, loss in enumerate(losses) if detector.see(float(loss))]


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.02])
def test_10000_noisy_falling_losses_hold_no_spike(noise):
    for seed in range(3):
        assert hits(Stability(spike_zscore=6.0), curve(10_000, noise, seed)) == []


@pytest.mark.parametrize("window", [20, 100, 300])
def test_every_planted_spike_is_found_and_nothing_else(window):
    losses = curve(6000, 0.01, seed=5)
    planted = sorted(set(np.random.default_rng(1).integers(window, 6000, 60).tolist()))
    losses[planted] *= 1.20  # 20 deviations
    assert hits(Stability(spike_zscore=8.0, spike_window=window), losses) == planted


def test_a_spike_early_in_the_fall_is_found():
    """20 deviations of the noise; less than 6 of the losses, whose plain deviation is mostly their fall."""
    t = np.arange(80)
    losses = 11 * np.exp(-t / 60) + np.random.default_rng(0).normal(0, 0.1, 80)
    losses[70] += 2.0
    assert abs(losses[70] - losses[:70].mean()) < 6 * losses[:70].std()
    assert hits(Stability(spike_zscore=6.0), losses) == [70]


def test_the_end_of_a_steep_fall_is_no_spike():
    t = np.arange(600)
    losses = np.maximum(10 - 0.05 * t, 2) + np.random.default_rng(0).normal(0, 0.02, 600)
    assert hits(Stability(spike_zscore=6.0), losses) == []


def test_spiked_losses_do_not_raise_the_bar_for_the_next():
    losses = np.concatenate([curve(200, 0.01, 0), np.full(500, 9.0)])
    assert hits(Stability(spike_zscore=6.0), losses) == list(range(200, 700))


def test_patience_waits_for_that_many_in_a_row():
    cfg = Stability(spike_zscore=6.0, spike_patience=3)
    quiet = curve(200, 0.01, 0).tolist()
    assert hits(cfg, [*quiet, 20.0, 20.0, quiet[-1], 20.0, 20.0, 20.0, 20.0]) == [205]


def test_half_a_window_is_needed_before_a_finite_loss_can_be_a_spike():
    cfg = Stability(spike_zscore=6.0, spike_window=100)
    losses = curve(60, 0.001, 0)
    assert hits(cfg, [*losses[:49], 100.0]) == []
    assert hits(cfg, [*losses[:50], 100.0]) == [50]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_a_spike_from_the_first_step_if_spikes_are_asked_for(bad):
    assert hits(Stability(spike_zscore=6.0), [bad, 3.0, bad]) == [0, 2]
    assert hits(Stability(spike_zscore=None), [bad, 3.0, bad]) == []


def test_losses_that_do_not_move_make_no_spike_of_a_rounding_error():
    assert hits(Stability(spike_zscore=6.0), [2.0] * 100 + [2.000001, 2.1]) == [101]


def test_a_detector_resumed_from_json_decides_as_the_one_it_continues():
    cfg = Stability(spike_zscore=4.0, spike_patience=2)
    losses = curve(1000, 0.03, 3)
    losses[::37] *= 1.3
    losses[1::37] *= 1.3
    whole = SpikeDetector(cfg)
    decisions = [whole.see(float(x)) for x in losses]
    assert any(decisions)
    for cut in (10, 38, 371, 500):  # 38 and 371 lie between the two losses of a spike
        first = SpikeDetector(cfg)
        for loss in losses[:cut]:
            first.see(float(loss))
        second = SpikeDetector(cfg)
        second.restore(json.loads(json.dumps(first.state())))
        assert [second.see(float(x)) for x in losses[cut:]] == decisions[cut:]

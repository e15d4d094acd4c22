"""Which losses are spikes. Host side and pure Python, so that a resumed run decides as the one it continues."""

import itertools
import math
import statistics
from collections import deque

from jaxllm.train.config import Stability

RESOLUTION = 1e-6  # relative: a float32 loss is not known better, so a smaller rise is never a spike


class SpikeDetector:
    """Tells spikes from the noise of a falling loss (rewinding on them: PaLM, arXiv:2204.02311, section 5.1).

    z = (loss - level) / noise over the last `spike_window` good losses, where
    - level is the mean of the newest tenth of them: the mean of all lags behind a falling loss, and a line fitted
      through them undershoots where the fall flattens out, which would turn the end of every fall into a spike.
      A short mean lags little, and on the safe side.
    - noise is the root of half the mean squared difference of neighbours (von Neumann et al. 1941): a trend hardly
      enters it, while the plain deviation of early losses is mostly trend and would hide spikes.
    Spiked losses enter neither, else the first would raise the bar for the next. A falling loss is no spike.
    """

    def __init__(self, cfg: Stability):
        self.cfg = cfg
        self._losses: deque[float] = deque(maxlen=cfg.spike_window)
        self._spiked = 0  # spiked losses in a row

    def see(self, loss: float) -> bool:
        """Takes the loss of the next step; True when it is the `spike_patience`-th spiked one in a row.

        NaN and infinity are spiked. Never True without `spike_zscore`; finite losses need spike_window / 2 before them.
        """
        if self.cfg.spike_zscore is None:
            return False
        if not self._is_spiked(loss):
            self._losses.append(loss)
            self._spiked = 0
            return False
        self._spiked += 1
        if self._spiked < self.cfg.spike_patience:
            return False
        self._spiked = 0  # reported: the next report takes as many again
        return True

    def _is_spiked(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        n = len(self._losses)
        if n < max(2, self.cfg.spike_window / 2):
            return False
        good = list(self._losses)
        newest = good[-max(1, n // 10) :]
        level = statistics.fmean(newest)
        noise = math.sqrt(statistics.fmean((b - a) ** 2 for a, b in itertools.pairwise(good)) / 2)
        noise = max(noise, RESOLUTION * abs(level)) * math.sqrt(1 + 1 / len(newest))  # the level is uncertain too
        return loss - level > self.cfg.spike_zscore * noise

    def state(self) -> dict:
        """All that decides the future, as JSON values."""
        return {"losses": list(self._losses), "spiked": self._spiked}

    def restore(self, state: dict) -> None:
        """Goes on where `state()` was taken. A smaller window keeps the newest losses."""
        self._losses = deque(state["losses"], maxlen=self.cfg.spike_window)
        self._spiked = state["spiked"]

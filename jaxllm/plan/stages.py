"""Where to cut layers into the stages of a pipeline, exactly, by dynamic programming. No JAX here.

It stands alone: nothing but tests calls it. `search` and the formulas know equal stages only, and a mesh gives all
stages equally many devices; `balanced` is for who sets `pipeline.stages`, which a compiled plan counts as they are.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


def balanced(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """How many consecutive layers each stage gets so that the slowest stage is as fast as can be.

    Args:
      costs: seconds of each layer; the first carries the embedding, the last the head.
    """
    n = len(costs)
    total = [0.0, *itertools.accumulate(costs)]
    best = [[math.inf] * (n + 1) for _ in range(stages + 1)]  # of the first j layers in k stages, the slowest
    cut = [[0] * (n + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for k in range(1, stages + 1):
        for j in range(k, n + 1):
            for i in range(k - 1, j):
                slowest = max(best[k - 1][i], total[j] - total[i])
                if slowest < best[k][j]:
                    best[k][j], cut[k][j] = slowest, i
    sizes, j = [], n
    for k in range(stages, 0, -1):
        sizes.append(j - cut[k][j])
        j = cut[k][j]
    return tuple(reversed(sizes))


class Stage(NamedTuple):
    """Layers `first` to `last`, without the last, on `devices` devices."""

    first: int
    last: int
    devices: int


class Cut(NamedTuple):
    """A pipeline and its latency in seconds."""

    stages: tuple[Stage, ...]
    latency: float


def latency(times: Sequence[float], microbatches: int) -> float:
    """Of a synchronous pipeline: the first microbatch passes every stage, the others wait for the slowest.

    Alpa's equation 2 (Zheng et al. 2022, arXiv:2201.12023); with 1F1B it is DAPPLE's (Fan et al. 2020, 2007.01045).
    """
    return sum(times) + (microbatches - 1) * max(times)


def cut(
    layers: int, devices: int, microbatches: int, seconds: Callable[[int, int, int], float], most: int | None = None
) -> Cut:
    """The pipeline of least latency over all cuts of the layers and all shares of the devices, which are all used.

    Alpa's inter-operator program (section 5.2): for every time that the slowest stage may take, the least sum of stage
    times by dynamic programming over (layers left, devices left); DAPPLE's planner is the case of replicated stages.

    Args:
      seconds: of layers first..last on so many devices, one microbatch; infinite where it does not fit.
      most: stages.
    """
    times = {
        (i, j, d): seconds(i, j, d)
        for i in range(layers) for j in range(i + 1, layers + 1) for d in range(1, devices + 1)
    }  # fmt: skip
    best = Cut((), math.inf)
    for slowest in sorted({t for t in times.values() if t < math.inf}):
        if (microbatches - 1) * slowest >= best.latency:
            break  # later ones only get slower
        stages = _least_sum(layers, devices, times, slowest, most or devices)
        if stages is not None:
            found = latency([times[s] for s in stages], microbatches)
            if found < best.latency:
                best = Cut(stages, found)
    return best


def _least_sum(
    layers: int, devices: int, times: dict[tuple[int, int, int], float], slowest: float, most: int
) -> tuple[Stage, ...] | None:
    """Stages of least summed time of which none takes longer than `slowest`."""
    best: dict[tuple[int, int, int], tuple[float, Stage | None]] = {
        (layers, 0, k): (0.0, None) for k in range(most + 1)
    }
    for i in range(layers - 1, -1, -1):
        for left in range(1, devices + 1):
            for k in range(1, most + 1):  # stages that may still be made
                options = [
                    (times[i, j, d] + best[j, left - d, k - 1][0], Stage(i, j, d))
                    for j in range(i + 1, layers + 1)
                    for d in range(1, left + 1)
                    if times[i, j, d] <= slowest and (j, left - d, k - 1) in best
                ]
                if options:
                    best[i, left, k] = min(options)
    if (0, devices, most) not in best:
        return None
    stages, i, left, k = [], 0, devices, most
    while i < layers:
        stage = best[i, left, k][1]
        stages.append(stage)
        i, left, k = stage.last, left - stage.devices, k - 1
    return tuple(stages)

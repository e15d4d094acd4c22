"""How long a step takes and what training costs: always an interval, always predicted. No JAX here.

From formulas or from a compiled program. The lower end hides every transfer that can go on beside compute, the upper
end hides none, both widened by how far the calibration is off where it was not fitted; in between stands what is
expected.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxllm.plan.analytic import Calibration, Estimate, Job, estimate
from jaxllm.plan.calibration import calibration
from jaxllm.plan.network import Group, group
from jaxllm.plan.search import Verdict, job_of, plans_of
from jaxllm.plan.topology import Topology
from jaxllm.train.config import RunConfig

if TYPE_CHECKING:
    from jaxllm.plan.account import Collective
    from jaxllm.plan.compiled import Proof


class Interval(NamedTuple):
    low: float
    high: float

    def times(self, factor: float) -> "Interval":
        return Interval(self.low * factor, self.high * factor)

    def over(self, numerator: float) -> "Interval":
        """numerator / value."""
        return Interval(numerator / self.high, numerator / self.low)

    def __str__(self) -> str:
        return f"{_short(self.low)} to {_short(self.high)}"


def _short(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one training step. Nothing here was measured."""

    on: Topology
    tokens: int  # of a step, over all devices
    flops: float  # of the model per token
    step_ms: Interval
    expected_ms: float
    terms: dict[str, float]  # milliseconds of a step by what takes them, nothing hidden
    basis: str  # what it was made from

    @property
    def tokens_per_s_per_chip(self) -> Interval:
        return self.step_ms.over(1e3 * self.tokens / self.on.chips)

    @property
    def mfu(self) -> Interval:
        """Share of the chips' 16-bit peak that the model's FLOPs are, attention over what it sees."""
        return self.tokens_per_s_per_chip.times(self.flops / self.on.chip.flops)

    @property
    def limit(self) -> str:
        """What takes the largest part of the step."""
        name = max(self.terms, key=self.terms.__getitem__)
        return f"{name} ({self.terms[name] / self.expected_ms:.0%} of the step)"

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "predicted": True, "predicted_from": self.basis, "step_ms": list(self.step_ms),
            "expected_ms": self.expected_ms, "tokens_per_s_per_chip": list(self.tokens_per_s_per_chip),
            "mfu": list(self.mfu), "limit": self.limit, "terms_ms": self.terms,
        }  # fmt: skip

    def __str__(self) -> str:
        mfu = self.mfu
        return (
            f"predicted from {self.basis}: {self.step_ms} ms a step (expected {_short(self.expected_ms)}), "
            f"{self.tokens_per_s_per_chip} tokens a second and chip, MFU {mfu.low:.0%} to {mfu.high:.0%}; "
            f"most of it {self.limit}"
        )


NAMES = {
    "products": "matrix products", "recompute": "products computed again", "attention": "attention",
    "elementwise": "memory bandwidth of norms, activations and the loss", "optimizer": "the optimizer's memory traffic",
    "bubble": "the pipeline's bubble", "tensor": "transfers over tensor", "context": "transfers over context",
    "pipe": "transfers over pipe", "gather": "gathering weights over fsdp", "scatter": "scattering gradients over fsdp",
    "data": "reducing gradients over data", "host": "transfers to host memory",
}  # fmt: skip


def predict(cfg: RunConfig, on: Topology, proof: "Proof | None" = None, length: int | None = None) -> Prediction:
    """Of a config, by its compiled program if there is one and its text is known, else by the formulas.

    Args:
      length: tokens of a row; None: the longest that the model is meant for.

    Raises:
      ConfigError: the mesh does not fit the topology.
    """
    reached = calibration(on)
    if proof is not None and proof.account is not None:
        return of_program(proof, reached)
    job = job_of(cfg, proof.length if proof else length)
    return of_estimate(job, on, estimate(job, on, plans_of(cfg, on), reached), reached)


def verdict(cfg: RunConfig, on: Topology, proof: "Proof") -> Verdict:
    """What `search(verify=...)` asks: verify = lambda cfg: verdict(cfg, on, prove(cfg, on))."""
    return Verdict(proof.fits, float(proof.peak_bytes), predict(cfg, on, proof).expected_ms, proof)


def of_estimate(job: Job, on: Topology, made: Estimate, reached: Calibration) -> Prediction:
    """Of the one plan that an estimate is of."""
    low, high, expected = (1e3 * float(x[0]) for x in made.time)
    terms = {NAMES[name]: 1e3 * float(value[0]) for name, value in made.terms._asdict().items()}
    return Prediction(
        on, job.tokens, job.sizes.flops, _widened(low, high, reached), expected,
        {name: ms for name, ms in terms.items() if ms > 0}, "formulas",
    )  # fmt: skip


def _widened(low: float, high: float, reached: Calibration) -> Interval:
    return Interval(low / (1 + reached.error), high * (1 + reached.error))


# --- compiled programs -----------------------------------------------------------------------------------------------


def of_program(proof: "Proof", reached: Calibration) -> Prediction:
    """Of a compiled program: the compiler's cycles, attention at its kernel's pace, collectives on this topology.

    libtpu's cycles of whole programs are not stretched. They stand where measurements do: Llama 2 7B with 4 rows of
    4096 tokens a chip of v5p is 4,062 M cycles (MaxText's program, libtpu 0.0.46), 2.6 s with attention; 2.5 s were
    published for such a step (arXiv:2507.05411). Where devices go different ways (stages of a pipeline), a device does
    in the mean over them, and what it waits for the others is the bubble.
    """
    on, a = proof.on, proof.account
    chip = on.chip
    # What no compiler estimated is counted at the chip's peaks, which products never reach.
    paced = sum(
        n / chip.clock / (reached.products if source == "roofline" else 1)
        for source, n in a.cycles.items() if source != "kernels"
    )  # fmt: skip
    kernels = max(
        a.kernel_asked / (chip.device_flops * reached.attention),
        sum(k.bytes * k.count for k in a.kernels) / chip.device_bandwidth,
        0.0 if a.kernel_asked else a.cycles.get("kernels", 0.0) / chip.clock,
    )
    floor = a.traffic / chip.device_bandwidth
    terms = {"products and what is fused with them": paced, "attention": kernels}
    shown = hidden = 0.0
    for c in a.collectives:
        each = seconds(c, on, proof.mesh, proof.across)
        beside = min(each, c.between / chip.clock) if c.overlapped else 0.0
        name = f"{c.kind} over {' x '.join(c.axes) or 'one device'}"
        terms[name] = terms.get(name, 0.0) + c.count * each
        shown, hidden = shown + c.count * each, hidden + c.count * beside
    compute = max(paced + kernels, floor)
    busy = 1 - proof.bubble
    least = (compute + shown - hidden) / busy
    expected = (compute + shown - reached.hidden * hidden) / busy
    if proof.bubble:
        terms[NAMES["bubble"]] = expected * proof.bubble
    if floor > paced + kernels:
        terms["memory bandwidth"] = floor
    return Prediction(
        on, proof.rows * proof.length, proof.model_flops * on.devices / (proof.rows * proof.length),
        _widened(1e3 * least, 1e3 * (compute + shown) / busy, reached), 1e3 * expected,
        {name: 1e3 * s for name, s in terms.items() if s > 0}, "the compiled program",
    )  # fmt: skip


def seconds(c: "Collective", on: Topology, mesh: dict[str, int], across: str | None = None) -> float:
    """Of one exchange on the links that its mesh axes have; `across` is the axis over slices."""
    over: Group = group(on, mesh, c.axes, devices=c.group, slow=c.slices > 1, across=across)
    match c.kind:
        case "all-reduce":
            return float(2 * over.gather(c.bytes))
        case "all-to-all" | "ragged-all-to-all":
            return float(over.swap(c.bytes))
        case "collective-permute" | "collective-broadcast":
            return float(over.shift(c.bytes))
    return float(over.gather(c.bytes))


# --- a whole training run --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """Predicted cost of training on so many tokens, each an interval; None where what it takes was not given."""

    tokens: float
    chips: int
    hours: Interval  # on the clock, without waiting, restarts and evaluations
    chip_hours: Interval
    energy_kwh: Interval
    co2e_kg: Interval | None
    money: Interval | None  # in the currency of the price

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"predicted": True} | {k: list(v) if isinstance(v, Interval) else v for k, v in values.items()}

    def __str__(self) -> str:
        said = f"predicted for {self.tokens:.3g} tokens on {self.chips} chips: {self.hours.times(1 / 24)} days"
        said += f", {self.chip_hours} chip-hours, {self.energy_kwh} kWh"
        said += f", {self.co2e_kg} kg CO2e" if self.co2e_kg else ""
        return said + (f", a price of {self.money}" if self.money else "")


def training_cost(
    prediction: Prediction,
    tokens: float,
    *,
    price_per_chip_hour: float | None = None,
    pue: float = 1.1,
    grid_g_per_kwh: float | None = None,
    watts: float | None = None,
) -> Cost:
    """Time, energy, emissions and money to train on `tokens` tokens at the predicted speed.

    energy = chips x power x time x PUE, emissions = energy x grid intensity (Patterson et al. 2021, arXiv:2104.10350,
    section 2.1). Hosts are not counted.

    Args:
      pue: energy that the data centre takes for each unit of the chips (Google reports 1.1 on average).
      grid_g_per_kwh: grams of CO2e that the grid emits for a kWh.
      watts: of a chip; None: what `chips` says of its kind.
    """
    chips = float(prediction.on.chips)
    hours = prediction.tokens_per_s_per_chip.over(tokens / chips / 3600)
    energy = hours.times(chips * (watts or prediction.on.chip.watts) * pue / 1000)
    return Cost(
        tokens, prediction.on.chips, hours, hours.times(chips), energy,
        energy.times(grid_g_per_kwh / 1000) if grid_g_per_kwh is not None else None,
        hours.times(chips * price_per_chip_hour) if price_per_chip_hour is not None else None,
    )  # fmt: skip

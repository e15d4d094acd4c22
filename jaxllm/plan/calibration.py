"""What chips reach of their data sheets, fitted to published runs; and how far the model is off where it is not.

`published.yaml` has the runs with their sources, `calibration.yaml` the few numbers fitted to all of them: for each
chip the share of its peak that matrix products reach, for some also that of attention, and for all chips together the
share of transfers that hides behind compute. No JAX here.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from jaxllm.core.config import parse
from jaxllm.models.config import DecoderConfig
from jaxllm.models.count import ffn_weights, flops_per_token
from jaxllm.plan.analytic import (
    Calibration,
    Job,
    Kept,
    Plans,
    Sizes,
    StepTime,
    Terms,
    Work,
    paced,
    sizes,
    step_time,
    work,
)
from jaxllm.plan.chips import GIB, HOP, Chip, Network, Torus
from jaxllm.plan.topology import Topology, topology

FOLDER = Path(__file__).parent
PUBLISHED, FITTED = FOLDER / "published.yaml", FOLDER / "calibration.yaml"

# Nobody can compile for it any more; one of its rows is a benchmark that others cite.
V3 = Chip(
    "v3", "tpu", "TPU v3", clock=0.94e9, flops=123e12, hbm_bytes=32 * GIB, hbm_usable=32 * GIB, hbm_bandwidth=900e9,
    watts=220, cores=2, devices=2, names_count="cores", links=Torus(2, 4.1e10, HOP), network=Network(3e9, 2e-5),
)  # fmt: skip
OLD = {"v3-256": Topology("v3-256", V3, (8, 16), 1)}


class Published(NamedTuple):
    """A run somebody measured, as the model sees it."""

    name: str
    source: str
    family: str  # rows that differ in little but the number of chips
    on: Topology
    job: Job
    plans: Plans  # one
    seconds: float  # a step, as published
    flops: float  # of the model per token, over what attention sees
    assumed: str  # what the source does not say
    note: str  # why the prediction is off, where it is by far
    tuned: bool  # whether the model is fitted to it

    @property
    def rate(self) -> float:
        """Tokens a second and chip."""
        return self.job.tokens / self.on.chips / self.seconds

    @property
    def mfu(self) -> float:
        return self.rate * self.flops / self.on.chip.flops


@functools.cache
def published(path: Path = PUBLISHED) -> tuple[Published, ...]:
    """The rows of the file, in its order."""
    tree = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    models = {name: _model(text) for name, text in tree["models"].items()}
    return tuple(_row(row, models[row["model"]], tree["sources"][row["source"]]) for row in tree["rows"])


class _Model(NamedTuple):
    decoder: DecoderConfig
    experts: float  # feed-forwards that a layer stores
    active: float  # that a token asks for
    used: float  # and that it takes, with the padding of their capacity

    def sizes(self, length: int) -> Sizes:
        s, ffn = sizes(self.decoder, length), ffn_weights(self.decoder, self.decoder.block)
        return s._replace(
            stored=self.experts, used=self.used, layer_parameters=s.layer_parameters + (self.experts - 1) * ffn,
            flops=s.flops + 6 * (self.active - 1) * ffn * s.layers,
        )  # fmt: skip


def _model(tree: dict[str, Any]) -> _Model:
    own = {name: tree[name] for name in ("experts", "active", "used") if name in tree}
    decoder = parse(DecoderConfig, {k: v for k, v in tree.items() if k not in own}, name=PUBLISHED.name)
    return _Model(decoder, own.get("experts", 1), own.get("active", 1), own.get("used", 1))


def _row(row: dict[str, Any], model: _Model, source: str) -> Published:
    on = OLD.get(row["topology"]) or topology(row["topology"])
    s = model.sizes(row["length"])
    job = Job(s, row["rows"], row.get("weights", 4), row.get("optimizer", 8), 2, row.get("speed", 1))
    mesh = row.get("mesh", {})
    fsdp = on.devices // math.prod(mesh.values())
    keep = row["kept"] if isinstance(row["kept"], dict) else {"device": row["kept"]}
    policy = Kept(*(frozenset(keep.get(place, ())) for place in ("device", "host")))
    plans = Plans.one(policy, fsdp=fsdp, accumulate=row.get("accumulate", 1), norm_seq=int("tensor" in mesh), **mesh)
    ((kind, value),) = row["measured"].items()
    counted = s.flops
    if row.get("counts") == "full":
        both = (flops_per_token(model.decoder, row["length"], causal=c).train for c in (False, True))
        counted += next(both) - next(both)
    rate = {
        "tokens": lambda: value,
        "seconds": lambda: job.tokens / on.chips / value,
        "tflops": lambda: value * 1e12 / counted,
        "mfu": lambda: value * on.chip.flops / counted,
    }[kind]()
    seconds = job.tokens / on.chips / rate
    return Published(
        row["name"], source, row["family"], on, job, plans, seconds, s.flops, row.get("assumed", ""),
        row.get("note", ""), row.get("fit", True),
    )  # fmt: skip


# --- the numbers in use ----------------------------------------------------------------------------------------------

# Share of the peak of flash attention, forward and backward, counting visible pairs; of other chips it is fitted.
# TPU: cycles that libtpu simulates of splash attention at 4096 tokens (v4: v5e's; v3: products without a kernel).
# v6e: all that heads of 128 let a matrix unit of 256 do; the rows would have it above 0.9, but little depends on it.
# h100: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608, figure 6).
ATTENTION = {"v3": 0.3, "v4": 0.46, "v5e": 0.46, "v5p": 0.47, "v6e": 0.5, "h100": 0.5}
LIKE = {"a100": "h100", "h200": "h100", "b200": "h100"}  # chips of which no run was published: as this one
UNKNOWN = {"products": 0.5, "attention": 0.25}  # of any other chip


@functools.cache
def fitted(path: Path = FITTED) -> dict[str, Any]:
    """The fitted numbers: `chips` (name -> products, attention), `hidden`, `hidden_blocking`, `error`."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def calibration(on: Topology) -> Calibration:
    """What the chips of a topology reach."""
    tree = fitted()
    chip = tree["chips"].get(LIKE.get(on.chip.name, on.chip.name), UNKNOWN)
    return Calibration(chip["products"], chip["attention"], tree["hidden"], tree["hidden_blocking"], tree["error"])


# --- the fit ---------------------------------------------------------------------------------------------------------

Parameters = dict[str, float]  # `products v5p`, `attention tpu7x`, `hidden`, `hidden_blocking`
START = {"products": 0.7, "attention": 0.3, "hidden": 0.8, "hidden_blocking": 0.5}
GRIDS = {
    "products": np.arange(0.40, 0.951, 0.01),
    "attention": np.arange(0.10, 0.951, 0.01),
    "hidden": np.arange(0, 1.001, 0.05),
    "hidden_blocking": np.arange(0, 1.001, 0.05),
}


class _Rows:
    """Rows side by side, with the work of their plans, which no parameter changes."""

    def __init__(self, rows: Sequence[Published], works: Sequence[Work] | None = None):
        self.rows, self.works = tuple(rows), tuple(works or (work(r.job, r.on, r.plans) for r in rows))
        terms = Terms(*(np.concatenate(column) for column in zip(*(w.terms for w in self.works))))
        rest = (np.concatenate([np.atleast_1d(v) for v in column]) for column in zip(*(w[1:] for w in self.works)))
        self.work = Work(terms, *rest)
        self.chips = sorted({r.on.chip.name for r in rows})
        self.chip = np.array([self.chips.index(r.on.chip.name) for r in rows])
        self.seconds = np.array([r.seconds for r in rows])
        families = [r.family for r in rows]
        self.weights = np.array([1 / families.count(f) for f in families]) / len(set(families))

    def only(self, wanted: Sequence[bool]) -> "_Rows":
        return _Rows(*zip(*(pair for pair, keep in zip(zip(self.rows, self.works), wanted, strict=True) if keep)))

    def reached(self, parameters: Parameters) -> np.ndarray:
        """[chip, field of Calibration]"""
        return np.array([_of(parameters, chip) for chip in self.chips])

    def predicted(self, reached: np.ndarray) -> StepTime:
        """[..., row], of calibrations [..., chip, field]."""
        c = Calibration(*np.moveaxis(reached[..., self.chip, :], -1, 0))
        return step_time(paced(self.work, c), c)

    def loss(self, reached: np.ndarray) -> np.ndarray | np.number:
        """[...]"""
        return np.abs(np.log(self.predicted(reached).expected / self.seconds)) @ self.weights


def _of(parameters: Parameters, chip: str) -> Calibration:
    """A chip's calibration; where no row of it was fitted, as the others are in the mean."""
    others = [v for n, v in parameters.items() if n.startswith("products")]
    return Calibration(
        parameters.get(f"products {chip}", statistics.fmean(others)),
        ATTENTION.get(chip) or parameters.get(f"attention {chip}", UNKNOWN["attention"]),
        parameters["hidden"], parameters["hidden_blocking"], blocks=1.0,  # the sources have kernels there too
    )  # fmt: skip


def fit(rows: Sequence[Published]) -> Parameters:
    """Parameters of the least mean |log(predicted / published)|, each family of rows counting once.

    Coordinate descent over `GRIDS`: the same rows give the same numbers.
    """
    return _fit(_Rows([row for row in rows if row.tuned]))


def _fit(known: _Rows) -> Parameters:
    names = [f"products {c}" for c in known.chips] + [f"attention {c}" for c in known.chips if c not in ATTENTION]
    best = {n: START[n.split()[0]] for n in [*names, "hidden", "hidden_blocking"]}
    loss, before = float(known.loss(known.reached(best))), math.inf
    while loss < before:
        before = loss
        for name in best:
            field, _, chip = name.partition(" ")
            values, which = GRIDS[field], known.chips.index(chip) if chip else slice(None)
            trials = np.repeat(known.reached(best)[None], len(values), 0)
            trials[:, which, Calibration._fields.index(field)] = values if chip else values[:, None]
            losses = known.loss(trials)
            least = int(losses.argmin())
            if losses[least] < loss - 1e-12:
                best, loss = best | {name: round(float(values[least]), 3)}, float(losses[least])
    return best


class Check(NamedTuple):
    """A row predicted by a model that was fitted without it."""

    row: Published
    predicted: float  # seconds a step
    low: float
    high: float

    @property
    def error(self) -> float:
        """Of the predicted step time: above 0, it is too slow."""
        return self.predicted / self.row.seconds - 1


def leave_one_out(rows: Sequence[Published], group: Callable[[Published], str] = lambda row: row.name) -> list[Check]:
    """Every row predicted by the fit to the rows of other groups."""
    everything, groups = _Rows(rows), [group(row) for row in rows]
    all_tuned = _fit(everything.only([row.tuned for row in rows]))
    checks: dict[str, Check] = {}
    for left_out in dict.fromkeys(groups):
        own = everything.only([g == left_out for g in groups])
        rest = [row.tuned and g != left_out for row, g in zip(rows, groups)]
        parameters = _fit(everything.only(rest)) if any(row.tuned for row in own.rows) else all_tuned
        time = own.predicted(own.reached(parameters))
        checks |= {r.name: Check(r, *map(float, t)) for r, *t in zip(own.rows, time.expected, time.low, time.high)}
    return [checks[r.name] for r in rows]

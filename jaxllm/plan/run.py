"""`jaxllm plan`: a config proven and predicted on chips that nobody has to own, or the best plan for them sought."""

import dataclasses
import json
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxllm.core.errors import ConfigError, UserError
from jaxllm.models.count import active, parameters
from jaxllm.plan.analytic import memory
from jaxllm.plan.chips import GIB
from jaxllm.plan.explain import block, explain, memory_parts, mesh_in_words, remat_in_words
from jaxllm.plan.predict import Cost, Prediction, predict, training_cost, verdict
from jaxllm.plan.search import HEADROOM, Found, Plan, Verdict, job_of, plans_of, search
from jaxllm.plan.topology import Topology, devices, topology
from jaxllm.train.config import RunConfig

if TYPE_CHECKING:  # brings JAX along
    from jaxllm.plan.compiled import Proof


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a plan is to be told besides its config.

    Raises:
      UserError: a number that cannot be.
    """

    on: str | None = None  # topology; None: the one that the config names
    search: bool = False  # look for the best plan, instead of taking the config's own
    top: int = 3  # plans of a search that are compiled
    proof: bool = True  # compile; else only formulas answer, in seconds
    tokens: float | None = None  # to train on; None: those of the config's steps
    price: float | None = None  # of a chip and hour, in any currency
    pue: float = 1.1  # energy the data centre takes for each unit of the chips
    grid: float | None = None  # grams of CO2e a kWh of its grid emits
    watts: float | None = None  # of a chip; None: what is typical of its kind

    MOST: ClassVar[float] = 1e30  # products of a few numbers up to this are finite
    RANGES: ClassVar[dict[str, tuple[str, Callable[[float], bool]]]] = {
        "top": ("at least 1", lambda n: n >= 1),
        "tokens": ("above 0", lambda n: n > 0),
        "price": ("0 or more", lambda n: n >= 0),
        "pue": ("at least 1", lambda n: n >= 1),
        "grid": ("0 or more", lambda n: n >= 0),
        "watts": ("above 0", lambda n: n > 0),
    }

    def __post_init__(self):
        for name, (right, holds) in self.RANGES.items():
            value = getattr(self, name)
            if value is not None and not (holds(value) and value <= self.MOST):
                raise UserError(f"--{name} must be {right}, and at most {self.MOST:g}; got {value:g}")


def plan(cfg: RunConfig, asked: Asked = Asked(), file: Path | None = None) -> dict[str, Any]:
    """Prints the plan and returns what `file` holds: `fits`, `peak_bytes`, `step_ms`, `mfu`, of one device and step.

    Raises:
      ConfigError: the config names no topology and none is asked for, its vocabulary is not set, or it does not fit
        the mesh.
      UserError: no such topology, its compiler is not installed or refuses the program, or a search finds nothing that
        fits.
    """
    if cfg.model.vocab is None:
        raise ConfigError(
            "model.vocab is not set: a plan knows no data; give the number of tokens, as model.vocab=32000"
        )
    name = cfg.topology if asked.on is None else asked.on
    if name is None:
        raise ConfigError("no topology: say --on v5e-256, or set `topology:` in the config")
    on = topology(name)
    if file is not None:
        check_writable(file)
    record: dict[str, Any] = {"topology": str(on)}
    proof = None
    if asked.search:
        found = _search(cfg, on, asked)
        print(explain(cfg, found))
        record |= {"search": _found(found), "yaml": block(found.best, cfg)}
        cfg, proof = found.best.cfg, found.best.verdict and found.best.verdict.proof
    elif asked.proof:
        proof = _prove(cfg, on, f"compiling the training step for {on} ...")
    prediction = predict(cfg, on, proof)
    cost = training_cost(
        prediction, float(cfg.batch_rows(cfg.steps)[0] * cfg.model.context) if asked.tokens is None else asked.tokens,
        price_per_chip_hour=asked.price, pue=asked.pue, grid_g_per_kwh=asked.grid, watts=asked.watts,
    )  # fmt: skip
    count = parameters(cfg.model)
    known, lines = _unproven(cfg, on) if proof is None else (proof.record(), _proof_lines(proof))
    record |= {"parameters": count, "active_parameters": active(cfg.model), "config": cfg.model_dump(mode="json")}
    record |= known | prediction.record() | {"training": cost.record()}
    print("\n".join(_lines(cfg, on, count, lines, prediction, cost)))
    if file is not None:
        file.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return record


def check_writable(file: Path) -> None:
    """Leaves no file where there was none.

    Raises:
      UserError: `file` cannot be written.
    """
    try:
        there = file.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a", encoding="utf-8").close()
        if not there:
            file.unlink()
    except OSError as e:
        raise UserError(f"--json {file} cannot be written ({e.strerror}); name another") from None


def _prove(cfg: RunConfig, on: Topology, said: str) -> "Proof":
    from jaxllm.plan.compiled import prove

    return prove(cfg, on, begin=lambda: print(said, flush=True))


def _search(cfg: RunConfig, on: Topology, asked: Asked) -> Found:
    if not asked.proof:
        return search(cfg, on)
    devices(on)  # a compiler that is not installed is told before anything is sought

    def verify(candidate: RunConfig) -> Verdict:
        said = f"compiling a candidate: mesh {mesh_in_words(candidate)}, {remat_in_words(candidate.remat)} ..."
        return verdict(candidate, on, _prove(candidate, on, said))

    return search(cfg, on, verify=verify, k=asked.top)


def _found(found: Found) -> dict[str, Any]:
    return {
        "seen": found.seen, "estimated": found.estimated, "exact": found.exact,
        "ranked": [_ranked(p) for p in found.ranked], "dropped": [_ranked(p) for p in found.dropped],
    }  # fmt: skip


def _ranked(p: Plan) -> dict[str, Any]:
    told = {"overrides": p.overrides, "formula_peak_bytes": p.peak}
    if p.verdict is None:
        return told | {"expected_ms": 1e3 * p.expected}
    if p.verdict.why:
        return told | {"fits": False, "why": p.verdict.why}
    return told | {"expected_ms": p.verdict.expected_ms, "peak_bytes": p.verdict.peak_bytes, "fits": p.verdict.fits}


# --- what is printed -------------------------------------------------------------------------------------------------


def _lines(cfg: RunConfig, on: Topology, count: int, known: list[str], prediction: Prediction, cost: Cost) -> list[str]:
    used = active(cfg.model)
    of_them = f" ({_scaled(used, 'KMBT')} active in a token, though all experts compute it)" if used < count else ""
    what = (
        f"{_scaled(count, 'KMBT')} parameters{of_them} on {on}, {cfg.batch} rows of {cfg.model.context} tokens a step"
    )
    return ["", what, *known, f"step       {prediction}", f"training   {cost}"]


def _scaled(n: Real, units: str) -> str:
    """Three digits and one of the units, each a thousand times the one before; of less than a thousand, none."""
    power = 0
    while n >= 999.5 and power < len(units):
        n, power = n / 1e3, power + 1
    return f"{n:.3g}{units[power - 1] if power else ''}"


def _gib(n: Real) -> str:
    return f"{n / GIB:,.2f}"


def _each(on: Topology) -> str:
    return "device" if on.chip.devices > 1 else "chip"


def _unproven(cfg: RunConfig, on: Topology) -> tuple[dict[str, Any], list[str]]:
    """What the formulas say of memory, where nothing was compiled: as JSON takes it, and as it is printed."""
    job, usable = job_of(cfg), on.chip.device_hbm
    used = memory(job, plans_of(cfg, on))
    peak = float(used.peak[0])
    fits = peak <= HEADROOM * usable
    parts = ", ".join(f"{name} {size:,.2f}" for name, size in memory_parts(used).items())
    line = (
        f"memory     (predicted) {'fits' if fits else 'DOES NOT FIT'}: peak {_gib(peak)} of {_gib(usable)} GiB a "
        f"{_each(on)}, of which {HEADROOM:.0%} are planned with: {parts}"
    )
    record = {
        "compiled": False, "fits": fits, "peak_bytes": peak, "hbm_bytes": usable,
        "model_flops": job.tokens / on.devices * job.sizes.flops,
    }  # fmt: skip
    return record, [line]


def _proof_lines(p: "Proof") -> list[str]:
    """The verdict, then where bytes and FLOPs go."""
    each, verdict = _each(p.on), "fits" if p.fits else f"DOES NOT FIT: {p.why}"
    lines = [
        f"verdict    {verdict}; compiled in {p.compile_s:.0f} CPU seconds, {_gib(p.rss_bytes)} GiB of memory",
        f"memory     peak {_gib(p.peak_bytes)} of {_gib(p.hbm_bytes)} GiB a {each}, {_gib(p.headroom)} left: "
        f"parameters {_gib(p.parameter_bytes)}, optimizer {_gib(p.optimizer_bytes)}, batch {_gib(p.batch_bytes)}, "
        f"temporary (activations, gradients, gathered weights) {_gib(p.temporary_bytes)}"
        + (f", host {_gib(p.host_bytes)}" if p.host_bytes else ""),
    ]
    if p.account is not None:
        lines.append(
            f"FLOPs      {_scaled(p.hardware_flops, 'KMGTP')} a {each}, {p.ratio:.2f} for each that the model asks for "
            f"({_scaled(p.model_flops, 'KMGTP')})"
        )
        moved = [
            f"{kind} {_gib(size)} over {' x '.join(axes) or 'no axis'}"
            for (kind, axes), size in sorted(p.account.collective_bytes_by_axes.items(), key=lambda x: -x[1])
            if size > GIB / 200
        ]
        moves = "; ".join(moved) or "next to nothing"
        lines.append(f"moves      GiB a {each}: {moves}; {p.account.overlapped:.0%} beside compute")
    return lines + [f"note       {note}" for note in p.notes]

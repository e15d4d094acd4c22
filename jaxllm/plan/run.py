"""`jaxllm plan`: a config proven and predicted on chips that nobody has to own, or the best plan for them sought."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxllm.core.errors import ConfigError, UserError
from jaxllm.plan.chips import GIB
from jaxllm.plan.predict import Cost, Prediction, predict, training_cost
from jaxllm.plan.topology import Topology, topology
from jaxllm.train.config import RunConfig

if TYPE_CHECKING:  # brings JAX along
    from jaxllm.plan.compiled import Proof
    from jaxllm.plan.search import Found


class Asked(NamedTuple):
    """What a plan is to be told besides its config."""

    on: str | None = None  # topology; None: the one that the config names
    search: bool = False  # look for the best plan, instead of taking the config's own
    top: int = 3  # plans of a search that are compiled
    proof: bool = True  # compile; else only formulas answer, in seconds
    tokens: float | None = None  # to train on; None: those of the config's steps
    price: float | None = None  # of a chip and hour, in any currency
    pue: float = 1.1  # energy the data centre takes for each unit of the chips
    grid: float | None = None  # grams of CO2e a kWh of its grid emits
    watts: float | None = None  # of a chip; None: what is typical of its kind


class Verified(NamedTuple):
    """What a search wants to know of a compiled plan."""

    fits: bool
    peak_bytes: float
    expected_ms: float


def plan(cfg: RunConfig, asked: Asked = Asked(), file: Path | None = None) -> dict[str, Any]:
    """Prints the plan and returns what `file` holds: `fits`, `peak_bytes`, `step_ms`, `mfu`, ... of one device and step.

    Raises:
      ConfigError: the config names no topology and none is asked for, its vocabulary is not set, or it does not fit
        the mesh.
      UserError: no such topology, its compiler is not installed, or a search finds nothing that fits.
    """
    if cfg.model.vocab is None:
        raise ConfigError("model.vocab is not set: a plan knows no data; give the number of tokens, as model.vocab=32000")
    name = asked.on or cfg.topology
    if name is None:
        raise ConfigError("no topology: say --on v5e-256, or set `topology:` in the config")
    on = topology(name)
    if file is not None:
        _check_writable(file)
    record: dict[str, Any] = {"topology": str(on)}
    if asked.search:
        found = _search(cfg, on, asked)
        cfg = found.best.cfg
        from jaxllm.plan.explain import block, explain

        print(explain(cfg, found))
        record |= {"search": _found(found), "yaml": block(found.best)}
    proof = None
    if asked.proof:
        from jaxllm.plan.compiled import prove

        print(f"compiling the training step for {on} ...", flush=True)
        proof = prove(cfg, on)
    prediction = predict(cfg, on, proof)
    tokens = asked.tokens or float(cfg.steps * cfg.batch * cfg.model.context)
    cost = training_cost(
        prediction, tokens, price_per_chip_hour=asked.price, pue=asked.pue, grid_g_per_kwh=asked.grid, watts=asked.watts
    )
    from jaxllm.models.count import parameters

    record |= {"parameters": parameters(cfg.model), "config": cfg.model_dump(mode="json")}
    record |= _unproven(cfg, on) if proof is None else proof.record()
    record |= prediction.record() | {"training": cost.record()}
    print("\n".join(_lines(cfg, on, proof, prediction, cost, record["parameters"])))
    if file is not None:
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _check_writable(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a", encoding="utf-8").close()
    except OSError as e:
        raise UserError(f"--json {file} cannot be written ({e.strerror}); name another") from None


def _search(cfg: RunConfig, on: Topology, asked: Asked) -> "Found":
    from jaxllm.plan.search import search

    if not asked.proof:
        return search(cfg, on)
    from jaxllm.plan.compiled import prove

    def verify(candidate: RunConfig) -> Verified:
        shown = {axis: n for axis, n in candidate.mesh.model_dump().items() if n != 1 and axis != "across"}
        print(f"compiling a candidate: mesh {shown}, remat {candidate.remat} ...", flush=True)
        proof = prove(candidate, on)
        return Verified(proof.fits, proof.peak_bytes, predict(candidate, on, proof).expected_ms)

    return search(cfg, on, verify=verify, k=asked.top)


def _found(found: "Found") -> dict[str, Any]:
    return {
        "seen": found.seen, "predicted_to_fit": found.fitting, "exact": found.exact,
        "ranked": [_ranked(p) for p in found.ranked], "dropped": [_ranked(p) for p in found.dropped],
    }  # fmt: skip


def _ranked(p: Any) -> dict[str, Any]:
    compiled = {"peak_bytes": p.verdict.peak_bytes, "fits": p.verdict.fits} if p.verdict else {}
    return {"overrides": p.overrides, "expected_ms": 1e3 * p.expected, "formula_peak_bytes": p.peak} | compiled


def _unproven(cfg: RunConfig, on: Topology) -> dict[str, Any]:
    """What the formulas say of memory, where nothing was compiled."""
    from jaxllm.plan.analytic import memory
    from jaxllm.plan.search import job_of, plans_of

    peak = float(memory(job_of(cfg), plans_of(cfg, on)).peak[0])
    return {"compiled": False, "fits": peak <= on.chip.device_hbm, "peak_bytes": peak, "hbm_bytes": on.chip.device_hbm}


def _lines(
    cfg: RunConfig, on: Topology, proof: "Proof | None", prediction: Prediction, cost: Cost, count: int
) -> list[str]:
    lines = ["", f"{count / 1e9:,.2f}B parameters on {on}, {cfg.batch} rows of {cfg.model.context} tokens a step"]
    if proof is not None:
        lines += _proof_lines(proof)
    return [*lines, f"step       {prediction}", f"training   {cost}"]


def _proof_lines(p: "Proof") -> list[str]:
    """The verdict, then where bytes and FLOPs go."""

    def gib(n: float) -> str:
        return f"{n / GIB:,.2f}"

    each = "device" if p.on.chip.devices > 1 else "chip"
    verdict = "fits" if p.fits else f"DOES NOT FIT: {p.why}"
    lines = [
        f"verdict    {verdict}; compiled in {p.compile_s:.0f} CPU seconds, {gib(p.rss_bytes)} GiB of memory",
        f"memory     peak {gib(p.peak_bytes)} of {gib(p.hbm_bytes)} GiB a {each}, {gib(p.headroom)} left: parameters "
        f"{gib(p.parameter_bytes)}, optimizer {gib(p.optimizer_bytes)}, batch {gib(p.batch_bytes)}, temporary (activations, "
        f"gradients, gathered weights) {gib(p.temporary_bytes)}" + (f", host {gib(p.host_bytes)}" if p.host_bytes else ""),
    ]
    if p.account is not None:
        lines.append(
            f"FLOPs      {p.hardware_flops / 1e12:,.1f}T a {each}, {p.ratio:.2f} for each that the model asks for "
            f"({p.model_flops / 1e12:,.1f}T)"
        )
        moved = [
            f"{kind} {gib(size)} over {' x '.join(axes) or 'no axis'}"
            for (kind, axes), size in sorted(p.account.collective_bytes_by_axes.items(), key=lambda x: -x[1])
            if size > GIB / 200
        ]
        lines.append(f"moves      GiB a {each}: {'; '.join(moved) or 'next to nothing'}; {p.account.overlapped:.0%} beside compute")
    return lines + [f"note       {note}" for note in p.notes]

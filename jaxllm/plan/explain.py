"""Why a plan is the best that was found: what limits it, why the next lost, what would help. No JAX here."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import yaml

from jaxllm.core.config import Config
from jaxllm.core.errors import UserError
from jaxllm.models.config import Remat
from jaxllm.parallel.config import MESH_AXES, Sharding
from jaxllm.plan.analytic import Calibration, Memory
from jaxllm.plan.calibration import calibration
from jaxllm.plan.chips import GIB, Chip, Torus
from jaxllm.plan.predict import NAMES, of_estimate
from jaxllm.plan.search import Found, Plan, search
from jaxllm.plan.topology import Topology
from jaxllm.train.config import RunConfig


def block(plan: Plan, given: RunConfig | None = None) -> str:
    """What a plan changes of the config `given`, as YAML that makes the plan's config: laid over it by a child whose
    `base:` it is, or put in the place of its blocks.

    Args:
      given: None: any config without sharding rules of its own; the plan's blocks are written out.
    """
    own, low = plan.cfg.model_dump(mode="json"), given.model_dump(mode="json") if given else {}
    lines = []
    for name in plan.overrides | own if given else plan.overrides:
        if own[name] != low.get(name, ...):
            match name:
                case "sharding":
                    value = _sharding(plan, given)
                case "remat" if isinstance(own[name], dict) and not own[name]["host"]:
                    value = own[name]["device"]
                case _:
                    value = _differing(own[name], (_default(name), low.get(name)))
            flow = None if isinstance(value, dict | list) else False
            lines.append(yaml.safe_dump({name: value}, sort_keys=False, default_flow_style=flow, width=110))
    return "".join(lines)


def _default(name: str) -> Any:
    value = RunConfig.model_fields[name].get_default()
    return value.model_dump(mode="json") if isinstance(value, Config) else value


def _differing(value: Any, lows: Sequence[Any]) -> Any:
    """What of a block must be said: all that any of the `lows` has otherwise. Of a `kind` all is said."""
    if not isinstance(value, dict) or "kind" in value:
        return value
    known = [low if isinstance(low, dict) else {} for low in lows]
    return {
        key: _differing(part, [low.get(key) for low in known])
        for key, part in value.items()
        if any(low.get(key, ...) != part for low in known)
    }


def _sharding(plan: Plan, given: RunConfig | None) -> str | dict[str, Any]:
    """The preset, and the rules that it or the config `given` has otherwise."""
    preset, own = plan.overrides["sharding"]["preset"], plan.cfg.sharding
    plain = Sharding.model_validate(preset)
    if own == plain:
        return preset
    lows = [low.model_dump(mode="json") for low in (plain, given.sharding if given else own)]
    return {"preset": preset} | _differing(own.model_dump(mode="json"), lows)


def summary(plan: Plan) -> str:
    """A plan in one line: its mesh and what is unusual about it."""
    own, cfg = plan.overrides, plan.cfg
    rest = []
    if own["sharding"]["preset"] != "zero3":
        rest.append(own["sharding"]["preset"])
    if "tensor" in own["sharding"]["activations"]["norm_seq"]:
        rest.append("norms along tensor")
    if "context" in own:
        rest.append(cfg.context.kind)
    if "pipeline" in own:
        rest.append(cfg.pipeline.schedule.kind + ("" if cfg.pipeline.recompute else " that keeps what remat keeps"))
    if cfg.accumulate > 1:
        rest.append(f"{cfg.accumulate} microbatches")
    rest.append(remat_in_words(cfg.remat))
    waiting = [
        name for name, waits in (("optimizer", cfg.offload.optimizer), ("weights", cfg.offload.parameters)) if waits
    ]
    if waiting:
        rest.append(f"{' and '.join(waiting)} on the host")
    return f"{mesh_in_words(cfg)}; {', '.join(rest)}"


def mesh_in_words(cfg: RunConfig) -> str:
    """Mesh axes of more than one device."""
    return " x ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, cfg.mesh.sizes) if n != 1) or "one device"


def remat_in_words(remat: Remat) -> str:
    """What the backward pass keeps, and where."""
    if isinstance(remat, str):
        return f"remat {remat}"
    kept = [" ".join(remat.device)] if remat.device else []
    return "remat keeps " + ", ".join([*kept, f"on the host {' '.join(remat.host)}"] if remat.host else kept)


def memory_parts(memory: Memory) -> dict[str, float]:
    """GiB of one plan by what takes them, the largest first; of the workspaces, the one that counts at the peak."""
    parts = {name: float(value[0]) / GIB for name, value in memory._asdict().items()}
    backward, head = parts["gradients"] + parts["layer"], parts["head"]
    for name in ("head",) if backward >= head else ("gradients", "layer"):
        del parts[name]
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def limits(plan: Plan, on: Topology) -> str:
    """What takes the time and the memory of a plan."""
    times = {NAMES[n]: float(v[0]) for n, v in plan.estimate.terms._asdict().items()}
    top = sorted(times.items(), key=lambda item: -item[1])[:3]
    memory = list(memory_parts(plan.estimate.memory).items())[:3]
    usable = on.chip.device_hbm / GIB
    return (
        "predicted time: " + ", ".join(f"{name} {1e3 * s:,.0f} ms" for name, s in top if s > 0)
        + f"; predicted memory {plan.peak / GIB:.1f} of {usable:.1f} GiB: "
        + ", ".join(f"{name} {size:.1f}" for name, size in memory if size >= 0.05)
    )  # fmt: skip


def lost(plan: Plan, best: Plan) -> str:
    """Term by term, why a plan is predicted to be slower than the best."""
    ours, theirs = (p.estimate.terms._asdict() for p in (best, plan))
    gains = {NAMES[n]: 1e3 * (float(theirs[n][0]) - float(ours[n][0])) for n in ours}
    shown = sorted(gains.items(), key=lambda item: -abs(item[1]))[:4]
    slower = 1e3 * (plan.expected - best.expected)
    return (
        f"{slower:+,.0f} ms predicted ({plan.expected / best.expected - 1:+.1%}): "
        + ", ".join(f"{name} {ms:+,.0f}" for name, ms in shown if abs(ms) >= 0.5)
    )  # fmt: skip


# --- what would help -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing about the chips or the run that were otherwise, and the best plan then."""

    what: str
    gain: float  # share of the predicted step time of the same tokens that it saves
    plan: Plan

    def __str__(self) -> str:
        return f"{self.what}: {self.gain:+.1%} of the predicted step time, with {summary(self.plan)}"


def changes(cfg: RunConfig, found: Found, reached: Calibration | None = None) -> list[Change]:
    """What one change would bring, the most helpful first: the formulas' best plan with it, beside that without it.

    Both are sought among the best meshes, but for those whose every plan that was compiled was dropped.
    """
    on, reached = found.on, reached or calibration(found.on)
    chip, good = on.chip, [plan.mesh for plan in found.ranked]
    dropped = [plan.mesh for plan in found.dropped if plan.mesh not in good]
    among = [mesh for mesh in found.meshes if mesh not in dropped]
    if not among:
        return []

    def best(run: RunConfig, on: Topology) -> tuple[float, Plan]:
        """Seconds a token, and the plan."""
        new = search(run, on, length=found.job.sizes.length, reached=reached, keep=1, among=among)
        return new.best.expected / new.job.tokens, new.best

    def with_chip(**better: Any) -> Topology:
        return on._replace(chip=chip._replace(**better))

    trials: list[tuple[str, RunConfig, Topology]] = [
        ("twice the memory of a chip", cfg, with_chip(hbm_bytes=2 * chip.hbm_bytes, hbm_usable=2 * chip.hbm_usable)),
        ("twice the memory bandwidth", cfg, with_chip(hbm_bandwidth=2 * chip.hbm_bandwidth)),
        ("twice the link to the host", cfg, with_chip(pcie=2 * chip.pcie)),
    ]
    if chip.links is not None and on.devices > 1:
        trials.append((f"twice the {_links(chip)}", cfg, with_chip(links=_twice(chip))))
    if on.slices > 1 and chip.network is not None:
        wider = chip.network._replace(bandwidth=2 * chip.network.bandwidth)
        trials.append((f"twice the network between {on.group}s", cfg, with_chip(network=wider)))
    trials.append(("twice the rows of a batch", cfg.model_copy(update={"batch": 2 * cfg.batch}), on))
    made, (now, _) = [], best(cfg, on)
    for what, run, other in trials:
        try:
            then, plan = best(run, other)
        except UserError:
            continue
        made.append(Change(what, 1 - then / now, plan))
    return sorted(made, key=lambda change: -change.gain)


def _links(chip: Chip) -> str:
    return "bandwidth of the torus" if isinstance(chip.links, Torus) else "bandwidth inside a host"


def _twice(chip: Chip) -> Any:
    links = chip.links
    if isinstance(links, Torus):
        return links._replace(link=2 * links.link)
    return links._replace(bandwidth=2 * links.bandwidth)


# --- all of it -------------------------------------------------------------------------------------------------------


def explain(cfg: RunConfig, found: Found, reached: Calibration | None = None) -> str:
    """What was found, for people: the best plans, what limits each, why others lost, what would help."""
    on, best = found.on, found.best
    reached = reached or calibration(on)
    whole = "no other is better" if found.exact else "the others by annealing"
    lines = [
        f"{found.seen:,} plans for {on}; {found.estimated:,} of them estimated one by one, {whole}",
        "",
        f"best: {summary(best)}",
        f"  {of_estimate(found.job, on, best.estimate, reached)}",
        f"  {limits(best, on)}",
    ]
    if compiled := best.verdict:
        lines.append(
            f"  compiled: fits, peak {compiled.peak_bytes / GIB:.1f} GiB, predicted {compiled.expected_ms:,.0f} ms"
        )
    for number, plan in enumerate(found.ranked[1:4], 2):
        lines += [f"{number}.: {summary(plan)}", f"  {lost(plan, best)}", f"  {limits(plan, on)}"]
    for plan in found.dropped:
        why = plan.verdict.why or f"compiled, takes {plan.verdict.peak_bytes / GIB:.1f} GiB"
        lines.append(f"dropped: {summary(plan)}: {why}")
    helpful = [change for change in changes(cfg, found, reached) if change.gain > 0.005]
    lines += ["", "what one change would bring:" if helpful else "no single change would bring much"]
    lines += [f"  {change}" for change in helpful]
    pasted = "the config asks for just that plan" if best.cfg == cfg else block(best, cfg)
    return "\n".join([*lines, "", pasted])

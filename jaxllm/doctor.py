"""`jaxllm doctor`: what this machine has for jaxllm, what it lacks, and what to type for it."""

import importlib.metadata
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

import jaxllm
from jaxllm.core.config import load
from jaxllm.core.errors import UserError
from jaxllm.core.metrics import Metrics
from jaxllm.core.sinks import check_extras
from jaxllm.inference.config import ChatConfig, GenerateConfig

CONSTRAINTS = Path(jaxllm.__file__).parents[1] / "constraints.txt"  # there in a checkout only
MARKS = {"good": "ok", "note": "--", "missing": "!!"}


class Finding(NamedTuple):
    """One line of the examination."""

    state: str  # good | note (works, but differs or is optional) | missing (something needed)
    subject: str
    found: str
    remedy: str = ""  # what to type


def examine(config: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Prints every finding; 1 if something needed is missing, else 0."""
    missing = 0
    for finding in findings(config, overrides):
        remedy = f"\n{'':24}-> {finding.remedy}" if finding.remedy else ""
        print(f"{MARKS[finding.state]}  {finding.subject:19} {finding.found}{remedy}", flush=True)
        missing += finding.state == "missing"
    print(
        f"\n{missing} needed thing{'s are' if missing != 1 else ' is'} missing (!!)"
        if missing
        else "\nall that is needed is here"
    )
    return int(missing > 0)


def findings(config: str | None, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """What there is to say about Python, packages, extras, devices, places, and a config if one is given."""
    new_enough = sys.version_info >= (3, 11)
    yield Finding("good" if new_enough else "missing", "python", f"{sys.version.split()[0]} at {sys.executable}",
                  "" if new_enough else "install Python 3.11 or newer")  # fmt: skip
    if installed("jaxllm") is None:
        yield Finding("missing", "jaxllm", "runs from its folder but is not installed", pinned_install())
        return
    requirements = [Requirement(text) for text in importlib.metadata.requires("jaxllm")]
    needed = [r for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})]
    broken = list(filter(None, map(unmet, needed)))
    yield from (Finding("missing", *problem) for problem in broken)
    if not broken:
        yield Finding(
            "good",
            "packages",
            f"{len(needed)} of {len(needed)} needed, among them jax {installed('jax')}, flax {installed('flax')}",
        )
    yield from untested()
    for extra in importlib.metadata.metadata("jaxllm").get_all("Provides-Extra"):
        of_extra = [r for r in requirements if r not in needed and r.marker.evaluate({"extra": extra})]
        absent = [problem[0] for r in of_extra if (problem := unmet(r))]
        if absent:
            yield Finding("note", f"extra {extra}", f"not here: {', '.join(absent)}", pip(f"jaxllm[{extra}]"))
        else:
            yield Finding("good", f"extra {extra}", "is here")
    if not broken:
        yield from machine()
        if config:
            yield from fit(config, overrides)


def pip(*what: str) -> str:
    """The command that installs `what` beside this Python, also where no environment is activated."""
    return shlex.join([sys.executable, "-m", "pip", "install", *what])


def pinned_install() -> str:
    """The command that installs this checkout with the versions it was tested with."""
    return pip("-c", str(CONSTRAINTS), "-e", str(CONSTRAINTS.parent))


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet(requirement: Requirement) -> tuple[str, str, str] | None:
    """Subject, finding and remedy if a requirement, with the extras it asks for, is not fulfilled here."""
    version, remedy = installed(requirement.name), pip(f"{requirement.name}{requirement.specifier}")
    if version is None:
        return requirement.name, "is not installed", remedy
    if not requirement.specifier.contains(version, prereleases=True):
        return requirement.name, f"{version}, needed is {requirement.specifier}", remedy
    inner = [r for r in map(Requirement, importlib.metadata.requires(requirement.name) or ()) if r.marker]
    of_extras = [r for r in inner for e in requirement.extras if r.marker.evaluate({"extra": e})]
    return next((problem for r in of_extras if (problem := unmet(r))), None)


def untested() -> Iterator[Finding]:
    """Direct dependencies whose version is not the one in constraints.txt, where there is one."""
    if not CONSTRAINTS.exists():
        return
    direct = {Requirement(text).name for text in importlib.metadata.requires("jaxllm")}
    pins = [
        Requirement(line) for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
    ]
    here = [
        pin for pin in pins if pin.name in direct and (not pin.marker or pin.marker.evaluate()) and installed(pin.name)
    ]
    other = [pin for pin in here if not pin.specifier.contains(Version(installed(pin.name)).public, prereleases=True)]
    if other:
        shown = ", ".join(f"{pin.name} {installed(pin.name)} (tested: {str(pin.specifier)[2:]})" for pin in other)
        yield Finding("note", "versions", shown, pinned_install())
    else:
        yield Finding("good", "versions", "those of constraints.txt")


def machine() -> Iterator[Finding]:
    """Devices, compilation cache, disk."""
    import jax

    from jaxllm.train.runtime import keep_compiled_programs

    yield from launched()
    if problem := why_no_devices():
        yield problem
        return
    devices = jax.devices()
    first = devices[0]
    stats = first.memory_stats() or {}  # the CPU has none
    memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB each" if "bytes_limit" in stats else ""
    yield Finding(
        "good",
        "devices",
        f"{len(devices)} x {first.device_kind} ({first.platform}{memory}), {jax.process_count()} process(es)",
    )
    if first.platform == "cpu" and shutil.which("nvidia-smi"):
        yield Finding("note", "GPU", "there is one, but JAX does not use it", pip("jaxllm[cuda]"))
    keep_compiled_programs()
    yield Finding("good", "compiled programs", f"kept in {jax.config.jax_compilation_cache_dir}")
    free = shutil.disk_usage(".").free / 2**30
    yield Finding(
        "good" if free > 5 else "note",
        "disk",
        f"{free:.0f} GiB free here",
        "" if free > 5 else "make room: checkpoints need it",
    )


def launched() -> Iterator[Finding]:
    """The other processes that `distributed: auto` would train with, if what launched this one tells of any."""
    import jax

    from jaxllm.train.config import Auto
    from jaxllm.train.distributed import Place, find

    try:
        place = find(Auto(), os.environ, jax.config.jax_platforms)
    except UserError as e:
        yield Finding("missing", "processes", str(e))
        return
    if isinstance(place, Place):
        found = f"{place.process} of {place.processes} by {place.told_by}; they meet at {place.coordinator}"
        yield Finding("good", "processes", found)
    elif place:
        yield Finding("good", "processes", f"one of a TPU pod, by {place.told_by}")


def why_no_devices() -> Finding | None:
    """What is wrong if JAX cannot start a platform that it was asked for by name."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:  # JAX asserts, in no words, that the CUDA plugin is there
        asked = jax.config.jax_platforms
        found = f"JAX_PLATFORMS={asked} cannot start; {' '.join(str(e).split()) or 'its plugin is not installed'}"
        extras = [name for name in ("cuda", "tpu") if name in (asked or "").split(",")]
        install = "".join(f", or {pip(f'jaxllm[{name}]')}" for name in extras)
        return Finding("missing", "devices", found, f"unset JAX_PLATFORMS{install}")
    return None


def fit(config: str, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """Whether a config loads and what it needs is there: for training sinks, data and devices, else a model."""
    from jaxllm import verbs

    try:
        verb = verbs.verb_of(config)
        cfg = load(verbs.schema(verb), config, overrides)
    except UserError as e:
        yield Finding("missing", "config", str(e))
        return
    yield Finding("good", "config", f"{config} is one for `jaxllm {verb}`")
    if verb == "prepare":
        return
    if verb in ("generate", "chat"):
        yield model_of(cfg)
        return
    yield from sinks_of(cfg.metrics)
    import jax

    from jaxllm.data.manifest import open_prepared
    from jaxllm.train.loop import fit_to_data
    from jaxllm.train.step import check_batches, set_up

    try:
        prepared = open_prepared(cfg.data.path)
        cfg = fit_to_data(cfg, prepared)
        yield Finding(
            "good",
            "data",
            f"{cfg.data.path}: {sum(task['train']['rows'] for task in prepared.manifest['tasks'].values())} rows"
            f" of {prepared.length} tokens",
        )
        if why_no_devices():  # said already
            return
        setup = set_up(cfg)
        check_batches(setup, prepared.length)
    except UserError as e:
        yield Finding("missing", "fit", str(e))
        return
    mesh = ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(setup.state)) / 2**30
    yield Finding("good", "mesh", f"{mesh}; the training state takes {size:.2f} GiB over all devices")


def sinks_of(metrics: Metrics) -> Iterator[Finding]:
    """The sinks whose package is not installed."""
    for sink in metrics.sinks:
        try:
            check_extras(Metrics(sinks=(sink,)))
        except UserError as e:
            yield Finding("missing", f"sink {sink.kind}", str(e).partition(";")[0], pip(f"jaxllm[{sink.kind}]"))


def model_of(cfg: GenerateConfig | ChatConfig) -> Finding:
    """Whether there is a checkpoint where a config of generate or chat says."""
    from jaxllm.pretrained import checkpoint_of
    from jaxllm.train.checkpoint import stored_model

    try:
        folder = checkpoint_of(Path(cfg.model), cfg.step)
        stored = stored_model(folder)
    except UserError as e:
        return Finding("missing", "model", str(e), "train one, or name another: model=RUN")
    return Finding("good", "model", f"{folder}: {stored.num_layers} layers, embed {stored.embed}")

"""Options for the compilers, in one place: what makes collectives run while the chip computes."""

import logging
from typing import Any

import jax

_log = logging.getLogger(__name__)
_known: dict[str, dict[str, Any]] = {}  # device kind -> options its compiler takes

_TPU: dict[str, Any] = {}
_BY_KIND: dict[str, dict[str, Any]] = {}
_GPU: dict[str, Any] = {}


def compiler_options(device: jax.Device) -> dict[str, Any]:
    """For `jax.jit(..., compiler_options=...)` of a training step on devices like this one.

    Options that the installed compiler does not know are left out, and logged: versions come and go with them.
    """
    kind = device.device_kind
    if kind not in _known:
        _known[kind] = _accepted(device, _wanted(device))
    return dict(_known[kind])


def _wanted(device: jax.Device) -> dict[str, Any]:
    if device.platform == "tpu":
        return _TPU | _BY_KIND.get(device.device_kind, {})
    return _GPU if device.platform == "gpu" else {}


def _accepted(device: jax.Device, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options with which something small compiles: all, or each that does alone."""
    if not options or _compiles(device, options):
        return options
    known = {name: value for name, value in options.items() if _compiles(device, {name: value})}
    _log.warning("this compiler for %s does not take %s", device.device_kind, ", ".join(options.keys() - known.keys()))
    return known


def _compiles(device: jax.Device, options: dict[str, Any]) -> bool:
    x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(x).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return False
    return True

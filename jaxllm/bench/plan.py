"""The planner's predictions beside published training speeds, each row predicted by a fit that has not seen it.

Nothing is measured here, so that rounds make no difference. Two cross-validations: leaving out one row at a time, and
leaving out its whole family (the same model and chip in other numbers). `ratio` is the target error over ours.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

import jaxllm
from jaxllm.core.errors import UserError
from jaxllm.plan import calibration
from jaxllm.plan.maxtext import CASES

TARGET = 0.15  # median absolute error of step times


def measure(rounds: int) -> dict[str, Any]:
    """Errors row by row and their medians; the table goes to stderr."""
    rows = calibration.published()
    alone = calibration.leave_one_out(rows)
    together = calibration.leave_one_out(rows, lambda row: row.family)
    fitted = calibration.fit(rows)
    error = statistics.median(abs(check.error) for check in alone)
    for line in table(alone):
        print(line, file=sys.stderr)
    families = {row.family for row in rows}
    inside = sum(c.low / (1 + error) <= c.row.seconds <= c.high * (1 + error) for c in alone)
    left_out = yaml.safe_load(calibration.PUBLISHED.read_text(encoding="utf-8"))["left_out"]
    return {
        "unit": "median |predicted / published - 1| of step times, each row left out of the fit",
        "ours": error,
        "target": TARGET,
        "ratio": TARGET / error,
        "families_left_out": statistics.median(abs(check.error) for check in together),
        "rows": [record(one, other.error) for one, other in zip(alone, together)],
        "count": {
            "rows": len(rows), "families": len(families), "above_30_percent": sum(abs(c.error) > 0.3 for c in alone),
            "published_inside_the_interval": inside,
        },
        "left_out": left_out,
        "fitted": fitted,
        "config": {"published": calibration.PUBLISHED.name, "calibration": calibration.FITTED.name},
        "peer_is": "published by others, sources in the rows; predicted by the formulas of jaxllm.plan.analytic",
    }  # fmt: skip


def record(check: calibration.Check, family_error: float) -> dict[str, Any]:
    """One row as JSON takes it."""
    row = check.row
    return {
        "name": row.name, "source": row.source, "topology": row.on.name, "chips": row.on.chips,
        "published_step_s": row.seconds, "predicted_step_s": check.predicted, "error": check.error,
        "error_without_family": family_error, "predicted_interval_s": [check.low, check.high],
        "published_tokens_per_s_per_chip": row.rate, "published_mfu": row.mfu, "assumed": row.assumed, "note": row.note,
        "fitted_to": row.tuned,
    }  # fmt: skip


def table(checks: list[calibration.Check]) -> list[str]:
    """Published against predicted, for people."""
    lines = [f"{'':38} {'published':>10} {'predicted':>10} {'error':>6}   tokens/s/chip published, MFU"]
    for check in checks:
        row, note = check.row, f"   {check.row.note}" if abs(check.error) > 0.3 else ""
        lines.append(
            f"{row.name:38} {row.seconds:9.3f}s {check.predicted:9.3f}s {check.error:+6.0%}   {row.rate:8,.0f} "
            f"{row.mfu:4.0%}{note}"
        )
    return lines


# --- MaxText ---------------------------------------------------------------------------------------------------------

# What our programs are held to: theirs by these factors.
LIMITS = {"peak_bytes": 1.0, "collective_bytes_total": 1.05, "hardware_flops": 1.0, "expected_step_ms": 0.95}


def beside(peer: str, python: str) -> dict[str, Any]:
    """Our compiled training steps beside MaxText's: same model, batch, topology and compiler, no chip involved.

    `ratio` is the smallest of limit x theirs / ours, over cases and figures: above 1, all limits are kept. A case that
    one side does not compile has its error in place of figures, and a ratio of 0.

    Args:
      python: an interpreter that has MaxText and, as MaxText brings it along, what jaxllm needs.

    Raises:
      UserError: no such peer or interpreter, or no case compiles, as where the peer is not installed.
    """
    if peer != "maxtext":
        raise UserError(f"bench plan: no peer {peer!r}; known: maxtext")
    if shutil.which(python) is None:
        raise UserError(f"bench plan: --peer-python {python} is no program; name a Python that has MaxText")
    cases: dict[str, Any] = {}
    for name in CASES:
        try:
            cases[name] = _case(python, name)
        except UserError as e:
            print(e, file=sys.stderr)
            cases[name] = {"error": str(e)}
    if all("error" in case for case in cases.values()):
        raise UserError(next(iter(cases.values()))["error"])
    worst = {name: min(case["ratios"].values()) if "ratios" in case else 0.0 for name, case in cases.items()}
    return {
        "unit": "smallest of limit x MaxText / ours over peak memory, collective bytes, FLOPs and predicted step time; "
        "0 for a case that does not compile",
        "ratio": min(worst.values()), "worst": worst, "limits": LIMITS, "cases": cases,
        "config": {"python": Path(python).name},
        "peer_is": "MaxText's published scripts and defaults, compiled ahead of time; both step times are predicted",
    }  # fmt: skip


def _case(python: str, name: str) -> dict[str, Any]:
    """Both sides of a case and their ratios. Theirs first: without MaxText it fails at once."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {side: _compiled(python, side, name, Path(folder) / side) for side in ("maxtext", "ours")}
    ratios = {figure: limit * sides["maxtext"][figure] / sides["ours"][figure] for figure, limit in LIMITS.items()}
    shown = ", ".join(f"{k} {sides['ours'][k] / sides['maxtext'][k]:.3f} (at most {v})" for k, v in LIMITS.items())
    print(f"{name}: ours / MaxText: {shown}", file=sys.stderr)
    return sides | {"ratios": ratios}


def _compiled(python: str, side: str, case: str, file: Path) -> dict[str, Any]:
    """One side of a case, compiled in a process of its own."""
    root = str(Path(jaxllm.__file__).parents[1])
    command = [python, "-m", "jaxllm.plan.maxtext", side, case, str(file)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, check=False)
    if not file.exists():
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        hint = "; --peer-python names the interpreter that has MaxText" if "ModuleNotFoundError" in last else ""
        raise UserError(f"bench plan: {side} of {case} did not compile with {python}: {last}{hint}")
    return json.loads(file.read_text(encoding="utf-8"))

"""The planner's predictions beside published training speeds, each row predicted by a fit that has not seen it.

Nothing is measured here, so that rounds make no difference. Two cross-validations: leaving out one row at a time, and
leaving out its whole family (the same model and chip in other numbers). `ratio` is the target error over ours.
"""

import statistics
import sys
from typing import Any

import yaml

from jaxllm.plan import calibration

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
        row = check.row
        lines.append(
            f"{row.name:38} {row.seconds:9.3f}s {check.predicted:9.3f}s {check.error:+6.0%}   {row.rate:8,.0f} {row.mfu:4.0%}"
            + (f"   {row.note}" if abs(check.error) > 0.3 else "")
        )
    return lines

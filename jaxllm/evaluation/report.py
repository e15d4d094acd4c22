"""Pictures of a run, drawn from its metrics.jsonl."""

import json
from pathlib import Path

from jaxllm.core.errors import DataError


def series(run: Path, *names: str) -> dict[str, tuple[list[int], list[float]]]:
    """name -> (steps, values) of each of the metrics `names` that the run has logged; half lines are left out.

    Raises:
      DataError: the folder has no metrics.jsonl.
    """
    file = run / "metrics.jsonl"
    if not file.exists():
        raise DataError(f"{run}: holds no metrics.jsonl, so no run has written there")
    found = {name: ([], []) for name in names}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the line that a killed run was writing
            continue
        for name in names:
            if name in entry and "step" in entry:
                found[name][0].append(entry["step"])
                found[name][1].append(float(entry[name]))
    return {name: points for name, points in found.items() if points[0]}


def draw_losses(run: Path) -> Path:
    """Draws RUN/loss.png, training and held-out loss over steps in nats a token, and returns its path.

    Raises:
      DataError: the run has logged no loss yet.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    curves = series(run, "loss", "validation_loss")
    if not curves:
        raise DataError(f"{run}: its metrics.jsonl holds no loss yet")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("validation_loss", "held out", "o-")):
        if name in curves:
            axes.plot(*curves[name], style, label=label, linewidth=1.2, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(run / "loss.png", dpi=150)
    pyplot.close(figure)
    return run / "loss.png"

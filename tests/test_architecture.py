"""The import order of jaxllm, held for every import, late ones inside functions included."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "core": set(),
    "data": {"core"},
    "objectives": {"core"},
    "parallel": {"core"},
    "models": {"core", "pallas_kernels"},
    "inference": {"core", "models", "parallel", "pallas_kernels"},
    "train": {"core", "data", "models", "objectives", "parallel", "inference"},  # inference: rollouts
    "plan": {"core", "data", "models", "objectives", "parallel", "train"},
    "evaluation": {"core", "data", "models", "inference"},
    "compress": {"core", "data", "models", "objectives", "parallel", "train"},
    "interop": {"core", "data", "models"},
    "studies": {"core", "data", "train", "evaluation"},
    "pallas_kernels": set(),
}
TOP = {
    "chat",
    "cli",
    "verbs",
    "generate",
    "pretrained",
    "convert",
    "embed",
    "presets",
    "doctor",
    "bench",
    "__init__",
    "__main__",
}  # may import everything; nothing below imports them


def imported(path: Path) -> set[str]:
    """Packages and top modules of ours that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = [name.split(".") for name in names]
    return {p[1] if p[0] == "jaxllm" else p[0] for p in ours if p[0] == "pallas_kernels" or p[0] == "jaxllm" and p[1:]}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package if package == "pallas_kernels" else ROOT / "jaxllm" / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_stands_below_it(package):
    wrong = [
        f"{file.relative_to(ROOT)} imports {other}; {package} may import only {sorted(MAY_IMPORT[package])}"
        for file in files(package)
        for other in sorted(imported(file) & (MAY_IMPORT.keys() | TOP) - {package} - MAY_IMPORT[package])
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_import_order_has_no_cycle():
    tuple(graphlib.TopologicalSorter(MAY_IMPORT).static_order())


def test_every_package_has_its_place_in_the_order():
    here = {p.stem for p in (ROOT / "jaxllm").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert here <= MAY_IMPORT.keys() | TOP, f"not in the table: {sorted(here - MAY_IMPORT.keys() - TOP)}"


def test_late_and_dotted_imports_are_seen(tmp_path):
    file = tmp_path / "late.py"
    file.write_text(
        "def f():\n    from jaxllm import cli\n    import jaxllm.train.loop as loop\n    import pallas_kernels\n"
    )
    assert imported(file) == {"cli", "train", "pallas_kernels"}


def test_no_file_is_named_after_nothing():
    nothing = {"utils", "util", "common", "helpers", "helper", "misc", "stuff"}
    named = [p for top in ("jaxllm", "pallas_kernels", "tests") for p in (ROOT / top).rglob("*")]
    assert not [str(p.relative_to(ROOT)) for p in named if p.stem in nothing and "__pycache__" not in p.parts]

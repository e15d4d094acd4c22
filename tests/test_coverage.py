"""docs/coverage.tsv says where each thing of the inventory stands and which test shows it; this holds it to that."""

import ast
import csv
import importlib
import os
from pathlib import Path

import pytest

from jaxllm import presets, verbs
from jaxllm.core.config import load

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs/coverage.tsv"


def rows() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f, delimiter="\t"))


def claims_of(path: Path) -> set[str]:
    """`function` and `Class::function` of every test in a file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    named = [(f"{c.name}::", node) for c in classes for node in c.body] + [("", node) for node in body]
    return {prefix + node.name for prefix, node in named if isinstance(node, ast.FunctionDef)}


def test_the_table_has_its_three_columns_filled_and_no_claim_twice():
    with TABLE.open(encoding="utf-8") as f:
        assert f.readline().rstrip("\n").split("\t") == ["id", "config or API", "test"]
    claims = [tuple(row.values()) for row in rows()]
    assert all(all(cells) and len(cells) == 3 for cells in claims)
    assert len(set(claims)) == len(claims)


def test_every_id_is_in_the_inventory():
    inventory = Path(os.environ.get("JAXLLM_SHARED", ROOT.parent / "shared")) / "inventory.tsv"
    if not inventory.exists():
        pytest.skip(f"no inventory at {inventory}; JAXLLM_SHARED names its folder")
    known = {line.split("\t")[0] for line in inventory.read_text(encoding="utf-8").splitlines()[1:]}
    assert not sorted({row["id"] for row in rows()} - known)


def test_every_named_test_exists():
    missing = []
    for row in rows():
        for node in row["test"].split():
            file, _, name = node.partition("::")
            if not (ROOT / file).is_file() or name.partition("[")[0] not in claims_of(ROOT / file):
                missing.append(f"{row['id']}: no test {node}")
    assert not missing, "\n" + "\n".join(missing)


def test_every_named_config_loads_and_every_named_api_is_there():
    for place in (place for row in rows() for place in row["config or API"].split()):
        if place.startswith("configs/models/"):
            presets.preset(Path(place).stem)
        elif place.endswith(".yaml"):
            load(verbs.schema(verbs.verb_of(ROOT / place)), ROOT / place)
        else:
            resolve(place)


def resolve(dotted: str):
    """`jaxllm.train.step.make_train_step` -> the function; raises where the path leads nowhere."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as e:
            if e.name not in (".".join(parts[:n]) for n in range(1, cut + 1)):
                raise
            continue
        for name in parts[cut:]:  # a field of a config class is no attribute of it
            found = getattr(found, "model_fields", {}).get(name) or getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


def test_an_api_that_is_not_there_is_noticed():
    resolve("jaxllm.train.config.RunConfig.clip")
    with pytest.raises(AttributeError):
        resolve("jaxllm.train.config.NoSuchConfig")
    with pytest.raises(ModuleNotFoundError):
        resolve("jaxlim.train")

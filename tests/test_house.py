"""The plan of the house: imports run one way, no file imports itself through others, none is large."""

import ast
from pathlib import Path

import tiltflow

ROOT = Path(tiltflow.__file__).parent
FLOORS = (
    ("_version",), ("core",), ("train",), ("nn", "metrics", "problems"), ("energies",), ("methods",), ("verdict",),
    ("report",), ("rewards",), ("run",), ("digits",), ("tilting", "sampling"), ("pipelines", "molecules"), ("bench",),
    ("cli",), ("__init__", "__main__"),
)  # fmt: skip
"""From the ground up; packages on one floor do not see each other."""
LONGEST, TYPICAL = 400, 180


def modules():
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.rglob("*.py")}


def imports(path):
    """Names of modules and objects of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tiltflow":
            yield from (f"{node.module}.{alias.name}".removeprefix("tiltflow").removeprefix(".") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("tiltflow.") for a in node.names if a.name.startswith("tiltflow."))


def floor(name):
    return next(i for i, rooms in enumerate(FLOORS) if name.split(".")[0] in rooms)


def test_no_import_runs_upwards():
    wrong = []
    for name, path in modules().items():
        for target in imports(path):
            room, other = name.split(".")[0], target.split(".")[0]
            if other != room and floor(target) >= floor(name):
                wrong.append(f"{name} -> {target}")
    assert not wrong, wrong


def test_no_circle_of_files():
    every = modules()

    def file_of(target):
        while target not in every and f"{target}.__init__" not in every:
            target = target.rpartition(".")[0]
        return target if target in every else f"{target}.__init__"

    edges = {name: {file_of(t) for t in imports(path)} - {name} for name, path in every.items()}
    while free := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in free:
            del edges[name]
    assert not edges, f"these import each other: {sorted(edges)}"


def test_at_most_five_modules_at_the_root_and_no_long_file():
    assert len(list(ROOT.glob("*.py"))) <= 5
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert max(lengths.values()) <= LONGEST, max(lengths, key=lengths.get)
    assert sorted(lengths.values())[len(lengths) // 2] <= TYPICAL

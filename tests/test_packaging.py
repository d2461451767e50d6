"""The package installs as it says: version, entry point, data files, pins that cover every dependency."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = {
    re.sub(r"[-_.]+", "-", name).lower(): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M
    )
}


def requirements(lines: list[str]) -> set[str]:
    """Normalised names of what requirement lines ask for, without tiltflow's own extras."""
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line).group()).lower() for line in lines}
    return names - {"tiltflow"}


def needed_by(names: set[str]) -> set[str]:
    """``names`` and all they need here, by the metadata of what is installed."""
    from packaging.requirements import Requirement

    found, todo = set(), set(names)
    while todo:
        name = todo.pop()
        found.add(name)
        lines = map(Requirement, importlib.metadata.requires(name) or [])
        todo |= (
            requirements([r.name for r in lines if r.marker is None or r.marker.evaluate({"extra": ""})])
            - found
        )
    return found


def declared() -> set[str]:
    extras = PROJECT["project"]["optional-dependencies"]
    return requirements(
        [*PROJECT["project"]["dependencies"], *(line for lines in extras.values() for line in lines)]
    )


def test_one_version():
    import tiltflow

    assert tiltflow.__version__ == importlib.metadata.version("tiltflow") == PROJECT["project"]["version"]


def test_entry_point_resolves():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="tiltflow")
    assert callable(script.load())


def test_core_dependencies_stay_few():
    assert requirements(PROJECT["project"]["dependencies"]) == {
        "torch",
        "numpy",
        "safetensors",
        "click",
        "tqdm",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="other systems need other packages")
def test_every_dependency_is_pinned_and_no_more():
    assert next(iter(PINS)) == "torch", "torch is pinned first"
    installed = [one for one in declared() if not str(one).startswith("ray")]  # large, and left out of [dev]
    needed = {name for name in needed_by(installed) if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert needed - set(PINS) == set(), "add these to constraints.txt"
    assert set(PINS) - needed <= {"setuptools"}, "nothing needs these pins any more"


def test_data_files_are_packaged():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["tiltflow"]
    package = ROOT / "tiltflow"
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    present = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert present - packaged == set(), "not matched by [tool.setuptools.package-data]"
    assert {"py.typed", "page.html.j2", "viewer.html.j2", "3Dmol-min.js"} <= {path.name for path in packaged}
    for folder in {path.parent for path in package.rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), f"{folder.name} would be left out of the wheel"


def test_optional_packages_are_not_imported_by_the_core():
    optional = ["matplotlib", "jinja2.environment", "scipy", "torchdiffeq", "mlxtend", "arviz_stats"]
    code = f"import sys, tiltflow.report, tiltflow.cli; print([m for m in {optional} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_make_and_ci_run_the_same():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("setup", "demo", "test", "test-all", "bench", "docs", "lint"):
        assert re.search(rf"^{target}:", makefile, re.M), target
    script = ROOT / ".ci" / "run"
    assert "make test" in script.read_text(encoding="utf-8") and script.stat().st_mode & 0o111

"""The site: it builds, loads nothing from elsewhere, names every public name, and its tables are those of the results."""

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import click
import pytest
import yaml

import tiltflow
from tiltflow.cli import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LOADS = re.compile(
    r"""<(?:script|img|iframe|audio|video|source|embed)\b[^>]*?\b(?:src|srcset)\s*=\s*["']?(?:https?:)?//[^\s"'>]+
    |<link\b(?=[^>]*\brel\s*=\s*["']?(?:stylesheet|preconnect|preload|prefetch|dns-prefetch|modulepreload|icon|manifest))
     [^>]*?\bhref\s*=\s*["']?(?:https?:)?//[^\s"'>]+
    |url\(\s*["']?(?:https?:)?//[^)]+\)|@import\s+["'](?:https?:)?//[^"']+""",
    re.VERBOSE | re.IGNORECASE,
)
"""What makes a browser fetch something from another host; links that a reader may follow are none."""


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.mark.parametrize(
    "bad",
    [
        '<script src="https://cdn.jsdelivr.net/npm/katex/katex.js"></script>',
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css?family=Roboto">',
        '<link href=//fonts.gstatic.com rel=preconnect>',
        '<img src="http://example.org/badge.svg">',
        "src: url(https://example.org/a.woff2)",
        '@import "https://example.org/a.css";',
    ],
)
def test_loads_from_elsewhere_are_seen(bad):
    assert LOADS.search(bad)
    assert not LOADS.search('<a href="https://arxiv.org/abs/2409.08861">paper</a> <link rel="next" href="b.html">')


def test_the_site_loads_nothing_from_elsewhere(site):
    files = [p for p in site.rglob("*") if p.suffix in (".html", ".css", ".svg")]
    assert len(files) > 20
    found = {p.name: LOADS.findall(p.read_text(encoding="utf-8")) for p in files}
    assert {name: hits for name, hits in found.items() if hits} == {}
    pages = "".join(p.read_text(encoding="utf-8") for p in files if p.suffix == ".html")
    # Material's script would fetch these two from a CDN and an API: it looks for them by these marks
    assert 'class="mermaid"' not in pages and 'data-md-component="source"' not in pages


def test_scripts_and_fonts_of_the_site_are_in_it(site):
    page = (site / "mathematics.html").read_text(encoding="utf-8")
    for name in re.findall(r'<(?:script|link)\b[^>]*?(?:src|href)="(assets/[^"]+)"', page):
        assert (site / name).is_file(), name
    css = (site / "assets" / "katex" / "katex.min.css").read_text(encoding="utf-8")
    fonts = set(re.findall(r"url\(([^)]+)\)", css))
    assert len(fonts) == 20 and all(name.endswith(".woff2") for name in fonts)
    assert all((site / "assets" / "katex" / name).is_file() for name in fonts)
    for vendored in ("katex", "iframe-worker"):
        assert "Permission is hereby granted" in (DOCS / "assets" / vendored / "LICENSE").read_text(encoding="utf-8")


def test_every_public_name_has_an_entry(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    names = [name for name in tiltflow.__all__ if not name.startswith("_")]
    assert [name for name in names if f'id="tiltflow.{name}"' not in page] == []
    assert 'id="tiltflow.no_such_name"' not in page
    assert not re.search(r":(class|func|mod):", page)


def test_six_sections():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert len(config["nav"]) == 6

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [leaf for child in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(child)]

    every = sorted(str(p.relative_to(DOCS)) for p in PAGES)
    assert sorted(leaves(config["nav"])) == every, "every page is in the navigation, once"


def equations(site: Path) -> list[str]:
    """What the script of the pages will render, with its marks."""
    text = "".join(p.read_text(encoding="utf-8") for p in site.rglob("*.html"))
    found = re.findall(r'<(?:span|div) class="arithmatex">(.*?)</(?:span|div)>', text, re.DOTALL)
    return [html.unescape(e).strip() for e in found]


def test_equations_are_marked_for_the_script(site):
    found = equations(site)
    assert len(found) > 100
    assert all(e.startswith(("\\(", "\\[")) and e.endswith(("\\)", "\\]")) for e in found)
    assert all(e.count("{") == e.count("}") and e.count("\\begin") == e.count("\\end") for e in found)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js to run the script that renders equations")
def test_every_equation_renders(site, tmp_path):
    script = """
      const katex = require(process.argv[2]);
      const all = JSON.parse(require("fs").readFileSync(process.argv[3]));
      const fails = e => { try { katex.renderToString(e, {strict: "error", displayMode: true}); } catch { return true; } };
      console.log(JSON.stringify(all.filter(fails)));
    """
    (tmp_path / "check.js").write_text(script, encoding="utf-8")
    wrong = "\\frac{1}"
    (tmp_path / "all.json").write_text(json.dumps([e[2:-2] for e in equations(site)] + [wrong]), encoding="utf-8")
    command = ["node", tmp_path / "check.js", site / "assets" / "katex" / "katex.min.js", tmp_path / "all.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [wrong]


def layout_and_tables():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return load("layout", ROOT / "benchmarks" / "layout.py"), load("tables", ROOT / "benchmarks" / "tables.py")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_tables_are_those_of_the_results():
    _, tables = layout_and_tables()
    names = []
    for path in (DOCS / "benchmarks").glob("*.md"):
        page = path.read_text(encoding="utf-8")
        names += re.findall(r"<!-- table ([^>]+) -->", page)
        fresh = tables.filled(page, lambda name: tables.TABLES[name]())
        assert fresh == page, f"run python benchmarks/tables.py: {path.name} is old"
        assert not re.search(r"^\|.*not run \|", page, re.M), "what was not run stands below a table"
    assert sorted(names) == sorted(tables.TABLES), "every table is on one page"


def test_old_names_of_methods_follow_the_registry():
    layout, _ = layout_and_tables()
    rows = [{"method": name} for name in ("adjoint_matching", "adjoint_matching_weighted", "socm")]
    old = {"rows": [*rows, {"noise": "σ = 1"}]}
    new_registry = {"adjoint_matching": 1, "adjoint_matching_endpoint": 1}
    renamed = layout.renamed(old, "methods-tilt-0.json", new_registry)
    assert [r.get("method") for r in renamed["rows"]] == ["adjoint_matching_endpoint", "adjoint_matching", "socm", None]
    assert old["rows"][0] == {"method": "adjoint_matching"}, "what was read is not changed"
    assert layout.renamed(old, "methods-tilt-0.json", {"adjoint_matching": 1, "adjoint_matching_weighted": 1}) == old
    assert layout.renamed(old, "methods-tilt-9.json", new_registry) == old
    assert all((layout.RESULTS / name).is_file() for name in layout.OLD_NAMES)


def test_files_and_modules_that_pages_name_exist():
    files, modules = set(), set()
    for path in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        if path.name == "lab-notes.md":
            continue  # a record: names are those of the day
        text = path.read_text(encoding="utf-8")
        files |= set(re.findall(r"\b((?:tiltflow|tests|benchmarks|recipes|requirements)/[\w/.-]+\.(?:py|txt|gz))\b", text))
        modules |= set(re.findall(r"\btiltflow(?:\.\w+)+", text))
    assert len(files) > 15 and len(modules) > 30
    assert [f for f in sorted(files) if not (ROOT / f).exists()] == []
    assert [m for m in sorted(modules) if not resolves(m)] == []
    assert not resolves("tiltflow.no_such_module") and not resolves("tiltflow.core.process.NoSuchClass")


def resolves(name: str) -> bool:
    """Whether a dotted name is a module of the package or an object in one."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def unknown_words(line: str) -> list[str]:
    """The command and the options of ``line`` that neither tiltflow nor, for ``python path.py``, the script knows."""
    words = re.split(r"\s[#>|]|\s&&|…", line)[0].split()
    if words[0] == "python":
        folder = ROOT / Path(words[1]).parent
        scripts = [ROOT / words[1], *([folder / "study.py"] if folder.name == "recipes" else [])]
        source = "".join(s.read_text(encoding="utf-8") for s in scripts)
        return [w for w in words[2:] if w.startswith("--") and f'"{w.split("=")[0]}"' not in source]
    command, rest = cli, words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(click.Context(command), rest[0])
        if found is None:
            return rest[:1]
        command, rest = found, rest[1:]
    known = {"--help"}.union(*(p.opts + p.secondary_opts for p in command.params))
    return [w for w in rest if w.startswith("--") and w.split("=")[0] not in known]


def test_commands_that_pages_name_are_those_that_run():
    """A line "From `command` (commit …" is the record of a result, with the options of its day."""
    lines = []
    for path in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        if path.name != "lab-notes.md":
            text = path.read_text(encoding="utf-8").replace("\\\n", " ")
            text = re.sub(r"```\w*\n(.*?)```", lambda block: indent(block[1], " " * 4), text, flags=re.S)
            text = re.sub(r"^From `[^`]+` \(commit .*$", "", text, flags=re.M)
            lines += re.findall(r"(?:^ {4,}|`)((?:tiltflow [a-z]|python (?:recipes|benchmarks)/\w+\.py)[^`\n]*)", text, re.M)
    assert len(lines) > 100
    assert {line: wrong for line in lines if (wrong := unknown_words(line))} == {}
    assert unknown_words("tiltflow finetune --iterations 3") == ["--iterations"]
    assert unknown_words("tiltflow fine-tune --rounds 3") == ["fine-tune"]
    assert unknown_words("python recipes/galaxies.py --seeds 0 --iterations 3") == ["--iterations"]

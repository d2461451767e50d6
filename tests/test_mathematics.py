"""docs/mathematics.md leans on modules and tests by name: they exist. (test_docs.py: its equations render.)"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")


def test_names_in_the_mathematics_exist():
    tests = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py")}
    names = set(re.findall(r"\b(test_\w+)`", TEXT))
    assert len(names) > 20
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(tests.values()), re.M))
    assert names - defined == set(), "no such test"
    files = set(re.findall(r"([\w/]+\.py)\b", TEXT))
    known = set(tests) | {str(p.relative_to(ROOT / "tiltflow")) for p in (ROOT / "tiltflow").rglob("*.py")}
    assert len(files) > 30
    assert files - known == set(), "no such module"

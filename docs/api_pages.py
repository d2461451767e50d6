"""mkdocs hook: the entries of api.md, one for each public name of ``tiltflow.__all__``, linked to each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent / "tiltflow"
MARK = "<!-- public names -->"
CHAPTERS = {
    "core": "The base process",
    "tilting": "Fine-tuning",
    "energies": "Energies",
    "sampling": "Sampling from an energy",
    "molecules": "Conformers",
    "pipelines": "diffusers pipelines",
    "verdict": "Checks and verdicts",
}
"""Package that a public name comes from → its chapter; all others stand under "More"."""
OTHERS = "More"


def public_names() -> dict[str, str]:
    """Public names without the underscored ones → the package each comes from, in the order of ``__all__``."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    home = {
        alias.asname or alias.name: (node.module or "").split(".")[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if "." in (node.module or "")
    }
    listed = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    return {name: home.get(name, "") for name in ast.literal_eval(listed) if not name.startswith("_")}


def entries() -> str:
    """Markdown of all entries, chapter by chapter."""
    names, parts = public_names(), []
    for chapter in (*CHAPTERS.values(), OTHERS):
        mine = [name for name, package in names.items() if CHAPTERS.get(package, OTHERS) == chapter]
        if mine:
            parts += [f"## {chapter}", *(f"::: tiltflow.{name}" for name in mine)]
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Fill the mark in api.md."""
    return markdown.replace(MARK, entries()) if page.file.src_uri == "api.md" else markdown


def on_page_content(html: str, page: Any, **kwargs: Any) -> str:
    """Turn ``:func:`~tiltflow.a.b``` in docstrings into code, with a link where b is public."""

    def reference(match: re.Match[str]) -> str:
        name = match[1].rpartition(".")[2] if match[1].startswith("~") else match[1]
        last = name.rpartition(".")[2]
        code = f"<code>{name}</code>"
        return f'<a href="#tiltflow.{last}">{code}</a>' if last in public_names() else code

    if page.file.src_uri != "api.md":
        return html
    return re.sub(r":(?:class|func|mod|data|meth|attr):<code>([^<]+)</code>", reference, html)

"""Names that the user types: ``module:function`` and ``file.py:function``.

What a run folder names is not imported, since a folder may come from anybody: its names are :class:`Foreign` until the user
vouches for the folder, or gives the names himself.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiltflow.core.errors import TiltflowError

NAMING = ("base", "reward", "judges", "conditions", "problem", "energy", "rescore")
"""Fields of configs that name code."""


class Foreign(str):
    """A name that a run folder brought: it is not imported."""


class Trusted(str):
    """A run folder whose names are imported, and those of the folders that it names in turn."""


def import_function(name: str) -> Any:
    """The object called ``module:function`` (the current folder is searched too) or ``path/to/file.py:function``.

    Raises:
        TiltflowError: not of that form, what the module raises when it is imported, or no such name in it; a name that came
            out of a run folder.
    """
    if isinstance(name, Foreign):
        raise TiltflowError(
            f"the run folder names code of somebody's, {str(name)!r}, which is not imported: if it is yours, give --trust "
            "(in Python trust=True), or name it yourself."
        )
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier():
        raise TiltflowError(f"{name!r} names no function: write module:function or path/to/file.py:function.")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            if "" not in sys.path:
                sys.path.insert(0, "")
            module = importlib.import_module(module_name)
    except Exception as error:
        raise TiltflowError(f"cannot import {module_name!r} of {name!r}: {type(error).__name__}: {error}.") from error
    if not hasattr(module, attribute):
        raise TiltflowError(f"{module_name!r} has no {attribute!r}; write module:function with a name that it defines.")
    return getattr(module, attribute)


def import_callable(name: str, what: str) -> Any:
    """The same, of something that must be callable; ``what`` says what it is for."""
    made = import_function(name)
    if not callable(made):
        raise TiltflowError(f"{what} {name!r} is a {type(made).__name__}, not callable.")
    return made


def anchored(name: str) -> str:
    """The name with the file or folder that it begins with made absolute, so that it means the same from any folder."""
    head, colon, attribute = name.partition(":")
    path = Path(head if not colon or head.endswith(".py") else f"{head}.py")
    return f"{path.resolve()}{colon}{attribute}" if path.exists() else name


def marked(config: Any, trust: bool) -> Any:
    """A config with the names of code in it marked as a folder's own, or as vouched for."""
    kind = Trusted if trust else Foreign

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return kind(value)
        return [mark(part) for part in value] if isinstance(value, list) else value

    if not isinstance(config, dict):
        return config
    return {key: mark(value) if key in NAMING else marked(value, trust) for key, value in config.items()}


def sources(config: Any) -> dict[str, str]:
    """The hash of every file of code that a config names, and of those beside them that they import; by path."""
    found: dict[str, str] = {}
    left = [file for name in _names(config) if (file := _file_of(name)) is not None]
    while left:
        path = left.pop().resolve()
        if str(path) not in found and path.is_file():
            text = path.read_bytes()
            found[str(path)] = hashlib.sha256(text).hexdigest()
            left += _imported(text, path.parent)
    return found


def _names(config: Any) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _names(value)
        elif key in NAMING:
            yield from (name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str))


def _file_of(name: str) -> Path | None:
    """The file that a name is defined in; of a module, if it was imported."""
    head, colon, _ = name.partition(":")
    if not colon:
        return None
    file = head if head.endswith(".py") else getattr(sys.modules.get(head), "__file__", None)
    return None if file is None else Path(file)


def _imported(text: bytes, folder: Path) -> Iterator[Path]:
    """Files in the folder that a source imports."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        named = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            named.append(node.module)
        for module in named:
            path = folder.joinpath(*module.split("."))
            yield from (path.with_name(f"{path.name}.py"), path / "__init__.py")

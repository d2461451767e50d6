"""Names that the user types: ``module:function`` and ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from tiltflow.core.errors import TiltflowError


def import_function(name: str) -> Any:
    """The object called ``module:function`` (the current folder is searched too) or ``path/to/file.py:function``.

    Raises:
        TiltflowError: not of that form, what the module raises when it is imported, or no such name in it.
    """
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

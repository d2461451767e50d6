"""Names that the user types: ``module:function`` and ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from tiltflow.core.errors import TiltflowError


def import_function(name: str) -> Any:
    """The object called ``module:function`` (the current folder is searched too) or ``path/to/file.py:function``."""
    module_name, _, attribute = name.partition(":")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(module_name)
    except (ImportError, FileNotFoundError) as error:
        raise TiltflowError(f"cannot import {module_name!r} of {name!r}: {error}.") from error
    if not hasattr(module, attribute):
        raise TiltflowError(f"{module_name!r} has no {attribute!r}; write module:function with a name that it defines.")
    return getattr(module, attribute)

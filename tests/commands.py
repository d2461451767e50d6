"""The command line in a test: in a process of its own, or in this one, without the seconds that imports take."""

import io
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from tiltflow.cli import main

Done = subprocess.CompletedProcess[str]


def apart(*args: object) -> Done:
    """In a process of its own."""
    command = [sys.executable, "-c", "from tiltflow.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def tiltflow(*args: object, cwd: Path | None = None) -> Done:
    """In this process, in single precision, as outside of tests."""
    out, err = io.StringIO(), io.StringIO()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    with pytest.MonkeyPatch.context() as patch, chdir(cwd or "."), redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["tiltflow", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
    torch.set_default_dtype(before)
    return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), out.getvalue(), err.getvalue())

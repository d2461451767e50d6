"""The README's first block runs as pasted and reaches the tilt."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_python_example():
    torch.set_default_dtype(torch.float32)
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    torch.manual_seed(0)
    names = {}
    exec(code.group(1), names)
    x = names["x"]
    assert float(x[:, 0].mean()) == pytest.approx(0.25, abs=0.04)  # N(0, .25 I) tilted by e^x
    assert names["tuned"].verdict().status == "pass"
    assert float(x[:, 1].mean()) == pytest.approx(0.0, abs=0.04)


def test_links_point_to_files():
    for target in re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target

"""Prompt files, and how conditions are drawn."""

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.pipelines.conditions import DrawnConditions
from tiltflow.pipelines.prompts import read_prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat\n\n  blue, red \n"),
        ("p.jsonl", '{"prompt": "a cat", "seed": 1}\n\n{"prompt": "blue, red"}\n'),
        ("p.csv", 'id,prompt\n1,a cat\n2,"blue, red"\n'),
    ],
)
def test_three_formats(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == ["a cat", "blue, red"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\nnot json\n', r'line 2: no text under "prompt"; line 3: not JSON'),
        ("p.jsonl", "1\n" * 7, "line 5: .*; and 2 more"),
        ("p.csv", "id,prompt\n1,a\n2,\n", "line 3: no prompt"),
        ("p.csv", "id,text\n1,a\n", "no column prompt among id, text"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud800"}\n', "prompt 2 holds half of a surrogate pair"),
        ("p.csv", "prompt\n" + "a" * 200_000 + "\n", "field larger than"),
        ("p.yaml", "a", "are read from .txt, .jsonl, .csv"),
    ],
)
def test_bad_lines_are_numbered(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(TiltflowError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(TiltflowError, match="no prompt file"):
        read_prompts(tmp_path / "none.txt")


def test_a_prompt_ends_at_the_end_of_its_line_only(tmp_path):
    """Form feed, next line and line separator belong to a prompt; Windows' line ends do not."""
    (tmp_path / "p.txt").write_bytes("a\x0cb\x85c\u2028d\r\ne\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a\x0cb\x85c\u2028d", "e"]


def test_groups_share_a_prompt_and_all_have_their_turn():
    drawn = DrawnConditions(3, per_prompt=2)(9, torch.Generator().manual_seed(0))["prompt"]
    assert drawn.shape == (9,) and (drawn[:8:2] == drawn[1::2]).all()
    assert sorted(drawn[:6:2].tolist()) == [0, 1, 2]


def test_misuse():
    for settings, message in (({"count": 0}, "at least 1"), ({"count": 1, "dropout": 1.5}, "dropout must be")):
        with pytest.raises(TiltflowError, match=message):
            DrawnConditions(**settings)

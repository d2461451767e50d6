"""The report: every number is there, nothing comes from elsewhere, nothing is unescaped, NaN is shown."""

import io
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.report import RunRecord, SummaryRow, plots, write_report
from tiltflow.report.sounds import spectrograms, wav
from tiltflow.verdict.line import STATUSES, Line

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

NAN = float("nan")
NO_CURVES = {"history": (), "adjoint_t": (), "adjoint_norm": ()}  # drawing is the slow part


def record(**changes) -> RunRecord:
    generator = torch.Generator().manual_seed(0)
    history = [
        {
            "iteration": i,
            "reward": 0.1 * i,
            "kl": 0.0123 * i,
            "loss": 9.87 / (i + 1),
            "grad_norm": 2.5,
            "seconds": 0.75 * i,
        }
        for i in range(4)
    ]
    facts = {
        "title": "digits tilted towards thickness",
        "command": "tiltflow finetune --base digits",
        "status": "warn",
        "verdict": [
            Line(
                "reward gap", 0.04321, -0.0205, 0.1107, "at most 10 %", "pass", "close to the reference"
            ),
            Line("judge gap", 0.1789, None, None, "at most 10 %", "warn", "the judge lags"),
        ],
        "summary": [
            SummaryRow("mean reward", 0.2111, 0.8222, 0.7933),
            SummaryRow("diversity", 9.811, None, 8.722),
        ],
        "before": torch.randn(5, 1, 6, 6, generator=generator),
        "after": torch.randn(5, 1, 6, 6, generator=generator),
        "history": history,
        "adjoint_t": [0.0, 0.5, 1.0],
        "adjoint_norm": [3.25, 2.125, 1.0625],
        "path_ess": 0.4142,
        "config": {"strength": 7.75, "steps": 40},
        "notes": ["weights speak of the noisy state"],
        "version": "9.8.7",
    }
    return RunRecord(**{**facts, **changes})


class Page(HTMLParser):
    """What a browser would load, run, and show."""

    def __init__(self, html: str):
        super().__init__()
        self.loads, self.tags, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            value for key, value in attrs if key in ("src", "href", "srcset", "action", "xlink:href")
        ]
        self.loads += [url for _, value in attrs for url in re.findall(r"url\((.*?)\)", value or "")]

    def handle_data(self, data):
        self.text.append(data)
        if self.tags[-1:] == ["style"]:
            self.loads += re.findall(r"url\((.*?)\)|@import\s*(\S+)", data)

    @property
    def external(self):
        return [url for url in self.loads if not str(url).startswith("data:")]


def page(folder, **changes) -> tuple[str, Page]:
    html = write_report(folder, record(**changes)).read_text(encoding="utf-8")
    return html, Page(html)


def test_every_number_is_there_in_full(tmp_path):
    html, parsed = page(tmp_path)
    run = record()
    given = [number for line in run.verdict for number in (line.value, line.low, line.high)]
    given += [number for row in run.summary for number in row[1:]]
    given += [number for row in run.history for number in row.values()]
    given += [*run.adjoint_t, *run.adjoint_norm, run.path_ess]
    for number in given:
        assert number is None or f'value="{number}"' in html, number
    text = " ".join(parsed.text)
    for shown in (
        "0.04321",
        "−0.0205",
        "7.75",
        "at most 10 %",
        "the judge lags",
        "noisy state",
        "9.8.7",
        run.command,
    ):
        assert shown in text, shown
    assert 'value="0.7934"' not in html  # the check itself can fail


def test_verdict_then_samples_then_numbers(tmp_path):
    for status in STATUSES:
        html, _ = page(tmp_path, status=status, **NO_CURVES)
        body = html[html.index("<body>") :]
        order = [
            body.index(s)
            for s in (f'"word">{status}<', "samples: before", "samples: after", "0.7933", "judge lags")
        ]
        assert order == sorted(order)


def test_page_loads_nothing(tmp_path):
    notes = ['see http://example.org and <img src="http://example.org/x.png">']
    html, parsed = page(tmp_path, notes=notes, history=record().history[:1])
    assert parsed.loads and not parsed.external
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert "default-src 'none'" in html
    bad = '<style>@import "x.css"; a {background: url(http://x/y.png)}</style><img src="http://x/y.png">'
    assert len(Page(bad).external) == 3


def test_strings_are_escaped(tmp_path):
    nasty = '<script>alert("x")</script>'
    line = Line(nasty, 1.0, None, None, nasty, "fail", nasty)
    row = SummaryRow(nasty, 1.0, 2.0, 3.0)
    html, parsed = page(
        tmp_path,
        **{**NO_CURVES, "history": [{"iteration": 0, nasty: 1.0}]},
        **dict.fromkeys(("title", "command", "version"), nasty),
        verdict=[line],
        summary=[row],
        config={nasty: nasty},
        notes=[nasty],
    )
    assert "script" not in parsed.tags and nasty not in html
    assert html.count("&lt;script&gt;") >= 10
    assert "script" in Page(nasty).tags


def test_nonfinite_numbers_are_named(tmp_path):
    samples = torch.full((3, 1, 4, 4), NAN)
    html, parsed = page(
        tmp_path,
        before=samples,
        verdict=[Line("log Z", NAN, -math.inf, math.inf, "gap at most .1", "cannot tell", "diverged")],
        summary=[SummaryRow("mean reward", NAN, None, math.inf)],
        history=[{"iteration": i, "reward": NAN, "kl": math.inf, "loss": -1.0} for i in range(3)],
        adjoint_norm=[NAN, NAN, NAN],
        path_ess=NAN,
    )
    text = " ".join(parsed.text)
    assert text.count("NaN") >= 9 and "−∞" in text and "∞" in text
    assert 'value="nan"' in html


@pytest.mark.parametrize("shape", [(7, 2), (7, 3, 5, 4), (1, 1, 2, 2)])
def test_points_and_colour_images(tmp_path, shape):
    samples = {"before": torch.zeros(shape), "after": torch.ones(shape), "reference": torch.ones(shape)}
    _, parsed = page(tmp_path, **samples, **NO_CURVES)
    assert sum(url.startswith("data:image/png") for url in parsed.loads) == 3


def test_sounds_are_heard_where_they_belong(tmp_path):
    """Players under before and after; the file is the sound at full loudness, its spectrogram a line at its pitch."""
    wavfile = pytest.importorskip("scipy.io.wavfile")
    tone = torch.sin(torch.arange(4_096) * torch.pi / 4).repeat(2, 2, 1) * 0.3  # a quarter of the Nyquist frequency
    rate, sound = wavfile.read(io.BytesIO(wav(tone[0], 8_000)))
    assert rate == 8_000 and sound.shape == (4_096, 2) and abs(sound).max() > 30_000
    picture = spectrograms(tone)
    rows = picture.shape[2]
    assert picture.shape[:2] == (2, 1) and 0 <= float(picture.min()) < float(picture.max()) <= 1
    assert int(picture[0, 0].mean(1).argmax()) == rows - 1 - (rows - 1) // 4
    html, parsed = page(tmp_path, sounds=([wav(tone[0], 8_000)], [wav(tone[1], 8_000)] * 2), **NO_CURVES)
    before, after = html.split("<h3>After</h3>")
    assert [part.count("<audio controls") for part in (before, after)] == [1, 2]
    assert "media-src data:" in html and not parsed.external and html.count("data:audio/wav;base64,") == 3


def test_smallest_record(tmp_path):
    samples = torch.full((2, 2), NAN)
    run = RunRecord("t", "c", "cannot tell", [], [], samples, samples)
    assert "cannot tell" in write_report(tmp_path, run).read_text(encoding="utf-8")


def test_write_is_atomic(tmp_path, monkeypatch):
    target = write_report(tmp_path, record(**NO_CURVES))
    kept = target.read_bytes()
    monkeypatch.setattr(plots, "curve", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path, record())
    assert target.read_bytes() == kept and [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(TiltflowError, match="create it first"):
        write_report(tmp_path / "missing", record())
    with pytest.raises(TiltflowError, match="'great' is no verdict"):
        record(status="great")
    with pytest.raises(TiltflowError, match=r"after samples have shape \(3, 5\)"):
        record(after=torch.zeros(3, 5))
    with pytest.raises(TiltflowError, match="one norm per time"):
        record(adjoint_t=[0.0])
    with pytest.raises(TiltflowError, match="value_range"):
        plots.image_grid(torch.zeros(1, 1, 2, 2), value_range=(1.0, 1.0))
    for module in ("jinja2", "matplotlib.image"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(TiltflowError, match=r'pip install "tiltflow\[report\]"'):
                write_report(tmp_path, record())


def pixels(data: bytes):
    """Decode PNG bytes (checksums included) to a (H, W, 4) float array."""
    from matplotlib.image import imread

    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return imread(io.BytesIO(data))


@pytest.mark.filterwarnings("error")
def test_plots_are_valid_png():
    n = 80  # long enough for the running mean
    wild = [NAN, math.inf, -1.0, 0.0, *(10.0**k for k in range(n - 4))]
    steps, levels = list(range(n)), {"before": 1.0, "reference": NAN, "after": None}
    drawn = [
        plots.curve(steps, {"a": wild, "b": steps}, "x", "y", levels),
        plots.curve(steps, {"a": wild}, "x", "y", log=True),
        plots.curve([], {"a": []}, "x", "y"),
        plots.curve([0], {"a": [NAN]}, "x", "y", log=True),
        plots.reward_against_kl(steps, [math.sin(s) for s in steps], levels),
        plots.reward_against_kl([NAN], [1.0]),
        plots.adjoint_norms([0.0, 0.5, 1.0], [1.0, 100.0, 1.0]),
        plots.pareto(
            [
                {"method": "a", "biased": True, "r": 1.0, "r_base": 0.0, "r_reference": 0.5, "kl": 2.0},
                {"method": "b", "biased": False, "r": 0.4, "r_base": 0.0, "r_reference": 0.5, "d": 1.0,
                 "d_base": 1.0, "d_reference": 1.1},
            ],
            "r",
            ("kl", "d"),
        ),
        plots.scatter2d(torch.randn(50, 2, generator=torch.Generator().manual_seed(1))),
        plots.scatter2d(torch.full((3, 2), NAN), limits=(0.0, 1.0, 0.0, 1.0)),
    ]
    for data in drawn:
        assert pixels(data)[..., 3].max() > 0  # something was drawn
    assert plots.limits2d(torch.full((3, 2), NAN)) is None
    left, right, bottom, top = plots.limits2d(torch.tensor([[0.0, 0.0], [1.0, 4.0]]))
    assert left < 0 < 1 < right and bottom < 0 < 4 < top


def test_image_grid_places_the_right_intensities():
    images = torch.tensor([-1.0, 1.0, 0.0, 9.0, NAN]).reshape(5, 1, 1, 1)
    grid = pixels(plots.image_grid(images, columns=3, width=5))  # 5 x 3 pixels, every other one a gap
    assert grid.shape == (3, 5, 4)
    shown = [grid[0, 0], grid[0, 2], grid[0, 4], grid[2, 0], grid[2, 2]]
    expected = [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 1, 1), (1, 0, 1)]
    for seen, wanted in zip(shown, expected, strict=True):
        assert seen[:3] == pytest.approx(wanted, abs=0.01) and seen[3] == 1
    assert grid[0, 1, 3] == 0 and grid[2, 4, 3] == 0  # gap and empty place are transparent


def test_no_global_plot_state(tmp_path):
    write_report(tmp_path, record())
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []

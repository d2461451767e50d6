"""The report: every number is there, nothing comes from elsewhere, nothing is unescaped, NaN is shown."""

import importlib.util
import io
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.report import (
    Figure,
    Figures,
    Gallery,
    Markup,
    Page,
    Picture,
    Table,
    gallery,
    history_figures,
    plots,
    render,
    require_report,
    scores_table,
    training_blocks,
    write_page,
)
from tiltflow.report import page as page_module
from tiltflow.report.figures import SAMPLING, TILTING, Curve, distance_figures, energy_figures, weight_figures
from tiltflow.report.samples import principal_axes, project
from tiltflow.report.sounds import spectrograms, wav
from tiltflow.report.tables import sampler_numbers, sampler_table
from tiltflow.verdict.line import STATUSES, Line, Score, Verdict, best_way

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

NAN = float("nan")
LINES = [
    Line("reward gap", 0.04321, -0.0205, 0.1107, "at most 10 %", "pass", "close to the reference"),
    Line("judge gap", 0.1789, None, None, "at most 10 %", "warn", "the judge lags"),
]
SCORES = [Score("mean reward", 0.2111, 0.8222, 0.7933, 0.7544, 0.8211), Score("diversity", 9.811, None, 8.722)]
T, NORMS = (0.0, 0.5, 1.0), (3.25, 2.125, 1.0625)
HISTORY = [
    {"iteration": i, "reward": 0.1 * i, "kl": 0.0123 * i, "loss": 9.87 / (i + 1), "grad_norm": 2.5, "seconds": 0.75 * i,
     "adjoint_norm": list(NORMS)}
    for i in range(4)
]  # fmt: skip


@pytest.fixture
def painting():
    """Here plots are painted."""


def images(*names, shape=(5, 1, 6, 6)):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name in names or ("Before", "After")}


def example(curves=(), **changes) -> Page:
    """A page of a fine-tuning run; its curves only if they matter, because drawing is the slow part."""
    facts = {
        "title": "digits tilted towards thickness",
        "command": "tiltflow finetune --base digits",
        "verdict": Verdict("warn", LINES),
        "blocks": [gallery(images(), caption="the same noise"), scores_table(SCORES)],
        "training": training_blocks(HISTORY, curves, t=T if curves else ()),
        "history": HISTORY,
        "facts": {"path ESS, of 1": 0.4142},
        "config": {"strength": 7.75, "steps": 40},
        "notes": ["weights speak of the noisy state"],
        "version": "9.8.7",
    }
    return Page(**{**facts, **changes})


class Parsed(HTMLParser):
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


def written(folder, page: Page) -> tuple[str, Parsed]:
    html = write_page(folder, page).read_text(encoding="utf-8")
    return html, Parsed(html)


# --- the page


def test_every_number_is_there_in_full(tmp_path):
    html, parsed = written(tmp_path, example(TILTING))
    given = [number for line in LINES for number in (line.value, line.low, line.high)]
    given += [number for row in SCORES for number in row[1:]]
    given += [number for row in HISTORY for number in row.values() if not isinstance(number, list)]
    given += [*T, *NORMS, 0.4142]
    for number in given:
        assert number is None or f'value="{number}"' in html, number
    text = " ".join(parsed.text)
    for shown in (
        "0.04321", "−0.0205", "7.75", "at most 10 %", "the judge lags", "noisy state", "9.8.7", "the same noise",
        "1 pass", "1 warn", "of 2 checks", "path ESS, of 1", "tiltflow finetune --base digits",
    ):  # fmt: skip
        assert shown in text, shown
    assert 'value="0.7934"' not in html and "adjoint_norm" not in text  # the check itself can fail; lists are not tabulated
    assert html.count("–</td>") == 4  # diversity of the reference and of two ways, and an interval that does not exist


def test_the_way_that_answers_is_named_and_the_others_are_not_counted(tmp_path):
    lines = [LINES[0]._replace(way="exact"), LINES[1]._replace(way="as drawn", status="fail")]
    _, parsed = written(tmp_path, example(verdict=best_way(lines, [])))
    text = " ".join(" ".join(parsed.text).split())
    assert "pass of its samples exact; as drawn: fail" in text and "1 pass of 1 checks" in text
    assert "judge gap, as drawn" in text


def test_verdict_then_samples_then_numbers(tmp_path):
    page = example(TILTING[:1])
    for status in STATUSES:
        html, _ = written(tmp_path, replace(page, verdict=Verdict(status, LINES)))
        body = html[html.index("<body>") :]
        places = (
            f'"word">{status}<', "samples: before", "samples: after", "0.7933", "judge lags", "How it got there",
            "noisy state", "Do it again", "Settings", "Every iteration",
        )  # fmt: skip
        order = [body.index(place) for place in places]
        assert order == sorted(order)


def test_page_loads_nothing(tmp_path):
    notes = ['see http://example.org and <img src="http://example.org/x.png">']
    html, parsed = written(tmp_path, example([TILTING[0]], notes=notes))
    assert parsed.loads and not parsed.external
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in html
    bad = '<style>@import "x.css"; a {background: url(http://x/y.png)}</style><img src="http://x/y.png">'
    assert len(Parsed(bad).external) == 3


def test_strings_are_escaped(tmp_path):
    nasty = '<script>alert("x")</script>'
    png = plots.image_grid(torch.zeros(1, 1, 2, 2))
    blocks = [
        Gallery(nasty, [Picture(nasty, png)], nasty),
        Figures(nasty, [Figure(nasty, nasty, png)], nasty),
        Table(nasty, [nasty], [[nasty], [nasty]], nasty),
        Table(nasty, [nasty], [[nasty]], nasty, folded=True),
    ]
    page = Page(
        nasty, nasty, Verdict("fail", [Line(nasty, 1.0, None, None, nasty, "fail", nasty)]), blocks, {nasty: nasty}, [nasty],
        [{"iteration": 0, nasty: nasty}], nasty, blocks, {nasty: 1.0},
    )  # fmt: skip
    html, parsed = written(tmp_path, page)
    assert "script" not in parsed.tags and nasty not in html
    assert html.count("&lt;script&gt;") >= 40
    assert "script" in Parsed(nasty).tags
    html, parsed = written(tmp_path, replace(page, blocks=[Markup("ours", nasty)]))
    assert parsed.tags.count("script") == 1 and "script-src 'unsafe-inline'" in html
    shapes = [{"name": nasty, "block": f"</script>{nasty}"}]
    viewer = page_module.fill("molecules/viewer.html.j2", shapes=shapes, library="")
    assert Parsed(viewer).tags.count("script") == 2 and nasty not in viewer  # its own two


def test_nonfinite_numbers_are_named(tmp_path):
    history = [{"iteration": i, "reward": NAN, "kl": math.inf, "loss": -1.0, "adjoint_norm": [NAN] * 3} for i in range(3)]
    page = example(
        verdict=Verdict("fail", [Line("log Z", NAN, -math.inf, math.inf, "gap at most .1", "cannot tell", "diverged")]),
        blocks=[gallery({"Before": torch.full((3, 1, 4, 4), NAN)}), scores_table([Score("reward", NAN, None, math.inf)])],
        training=training_blocks(history, TILTING, t=T),
        history=history,
        facts={"path ESS, of 1": NAN},
    )
    html, parsed = written(tmp_path, page)
    text = " ".join(parsed.text)
    assert text.count("NaN") >= 9 and "−∞" in text and "∞" in text
    assert 'value="nan"' in html and 'value="inf"' in html


def test_cells_of_a_table():
    rows = [["a", 1.5, "cannot tell", None], ["b", True, 3, "x" * 50]]
    html = render(Page("t", "c", None, [Table("h", ["name", "n", "said", "more"], rows, "what a row is")]))
    assert "<th>a</th>" in html and '<td class="n"><data value="1.5">1.5</data></td>' in html and "<td>True</td>" in html
    assert '<span class="chip cannot-tell">cannot tell</span>' in html and '<td class="long">x' in html
    assert "what a row is" in html and '<td class="n">–</td>' in html


def test_what_is_empty_takes_no_place(tmp_path):
    _, parsed = written(tmp_path, Page("t", "c", None, [Figures("nil", []), Table("nil", ["a"], [])]))
    text = " ".join(parsed.text)
    assert "nil" not in text and "Is it right?" not in text and "Settings" not in text and "Every iteration" not in text
    html, _ = written(tmp_path, Page("t", "c", Verdict("cannot tell", []), []))
    assert '"word">cannot tell<' in html and "checks" not in html


def test_write_is_atomic(tmp_path, monkeypatch):
    target = write_page(tmp_path, example())
    kept = target.read_bytes()
    monkeypatch.setattr(page_module, "number", lambda value: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(tmp_path, example())
    assert target.read_bytes() == kept and [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(TiltflowError, match="create it first"):
        write_page(tmp_path / "missing", example())
    for verdict in (Verdict("great", []), Verdict("pass", [LINES[0]._replace(status="great")])):
        with pytest.raises(TiltflowError, match="'great' is no verdict"):
            example(verdict=verdict)
    with pytest.raises(TiltflowError, match="one norm per time"):
        training_blocks(HISTORY, TILTING[:1], t=[0.0])
    with pytest.raises(TiltflowError, match="value_range"):
        gallery(images(), value_range=(1.0, 1.0))
    with pytest.raises(TiltflowError, match="one event shape"):
        gallery({"Before": torch.zeros(3, 5), "After": torch.zeros(3, 4)})
    for module, job in (("jinja2", example), ("matplotlib.image", lambda: gallery(images()))):
        page = example()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(TiltflowError, match=r'pip install "tiltflow\[report\]"'):
                render(page) if job is example else job()


def test_a_missing_extra_is_found_before_the_work(monkeypatch):
    require_report()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("jinja2", "scipy") else found(name))
    with pytest.raises(TiltflowError, match=r'needs jinja2, scipy: pip install "tiltflow\[report\]"'):
        require_report()


# --- samples


def decoded(shown: Gallery):
    return {picture.name: pixels(picture.png) for picture in shown.pictures}


SHAPES = [(), (1,), (2,), (3,), (7,), (3, 3), (4, 4), (1, 8, 8), (3, 8, 8), (4, 8, 8), (3, 5, 8, 8), (4, 5, 8, 8)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("event", "particles"),
    [*((event, False) for event in SHAPES), *((event, True) for event in ((), (3,), (1, 3), (2, 3), (3, 3), (13, 2)))],
)
def test_any_event_shape_is_shown(event, particles, generator):
    """Broken rows are counted; sets that have nothing to show are named, and none is refused."""
    base, reference = (torch.randn(20, *event, generator=generator) for _ in range(2))
    after = base + 1
    after[3] = NAN
    after[4:6].view(2, -1)[:, 0] = torch.tensor([math.inf, -1e36])
    shown = gallery({"Before": base, "After": after, "Reference": reference, "None": None}, particles=particles)
    assert "3 of 20 samples of After are not finite" in shown.caption and "of Before" not in shown.caption
    pictures = decoded(shown)
    one = math.prod(event) == 1 or (event, particles) == ((2, 3), True)
    assert list(pictures) == (["Before, After, Reference"] if one else ["Before", "After", "Reference"])
    assert all(picture[..., 3].max() > 0 for picture in pictures.values())
    alone = gallery({"After": torch.full((4, *event), NAN), "Before": torch.empty(0, *event)}, particles=particles)
    assert "4 of 4 samples of After are not finite" in alone.caption and "Before is empty." in alone.caption
    render(Page("t", "c", None, [shown, alone]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 7), torch.zeros(2, 7), torch.zeros(5, 9, 2), torch.full((6,), 1e8), torch.full((4, 2), 3.0),
        torch.tensor([[1e29, -1e29], [0.0, 1.0]]), torch.arange(6), torch.arange(24).view(2, 3, 4) > 5,
        torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(2, 1, 4, 4, dtype=torch.float16, requires_grad=True),
        torch.zeros(3, 0), torch.zeros(2, 1, 1, 1), torch.zeros(0), torch.tensor([1.0, 2.0]).repeat(3, 20_000),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype}",
)  # fmt: skip
def test_degenerate_samples_are_shown(x):
    for particles in (False, True):
        shown = gallery({"Samples": x}, particles=particles)
        assert shown.caption or x.dim() == 4
        assert bool(shown.pictures) == (x.numel() > 0)
    assert gallery({}).caption == "There is nothing to show."


def test_the_caption_says_what_is_shown(generator):
    def said(*shape, **more):
        return gallery({"Samples": torch.randn(*shape, generator=generator)}, **more).caption

    assert said(9, 4, 2, particles=True) == "The first two principal axes of the sorted distances of 4 particles in 2-D."
    assert said(9, 2, 3, particles=True) == "The only coordinate of the sorted distances of 2 particles in 3-D."
    assert said(9, 4, 4) == "The first two principal axes of 16 coordinates."
    assert said(9, 2, caption="First.") == "First. The two coordinates." and said(9) == "The only coordinate."
    assert said(70, 1, 2, 2) == "Samples: the first 64 of 70."
    assert said(5_001, 2) == "The two coordinates. Samples: the first 5000 of 5001."
    clips = "One clip a row, 8 of its 20 frames from left to right. Samples: the first 8 of 9."
    assert said(9, 3, 20, 2, 2) == clips and said(8, 1, 2, 2) == ""


def test_clips_are_rows_of_frames():
    """Frame f of clip c has intensity (3c + f)/10: the grid reads 0, .1, .2 and .3, .4, .5."""
    clips = (torch.arange(6.0) / 10).view(2, 1, 3, 1, 1).expand(2, 1, 3, 2, 2)
    grid = decoded(gallery({"Samples": clips}, value_range=(0.0, 1.0)))["Samples"]
    h, w = grid.shape[0] / 5, grid.shape[1] / 8  # 2 rows and 3 columns of 2 pixels, with gaps of one
    seen = [[float(grid[int((3 * c + 0.5) * h), int((3 * f + 0.5) * w), 0]) for f in range(3)] for c in range(2)]
    assert torch.tensor(seen).flatten().tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], abs=0.01)


def test_points_share_their_limits():
    """The same points give the same picture only beside the same other set."""
    a, far = torch.randn(50, 2, generator=torch.Generator().manual_seed(1)), torch.full((50, 2), 9.0)
    near = decoded(gallery({"After": a, "Samples": a}))
    assert (near["After"] == near["Samples"]).all()
    assert (decoded(gallery({"After": a, "Samples": far}))["After"] != near["After"]).any()


def test_projection_sees_what_rotation_cannot_hide(generator):
    x = torch.randn(500, 4, 2, generator=generator)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator)).Q
    a, b = project([x, (x @ turn)[:, [2, 0, 3, 1]]], True)[0]
    torch.testing.assert_close(a, b)
    points, text = project([x.flatten(1) * torch.arange(1.0, 9.0)], False)
    assert "principal" in text and points[0].std(0).tolist() == pytest.approx([8, 7], rel=0.1)
    assert not torch.allclose(*project([x, x[:, [0, 0, 2, 3]]], True)[0])


def test_axes_of_many_coordinates_are_those_of_few(generator):
    """Either eigenproblem gives the axes of the singular value decomposition, up to their signs."""
    for n, d in ((30, 8), (8, 30)):
        x = torch.randn(n, d, generator=generator)
        x = x - x.mean(0)
        overlap = principal_axes(x).T @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T
        torch.testing.assert_close(overlap.abs(), torch.eye(2))


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
    heard = {"Before": [wav(tone[0], 8_000)], "After": [wav(tone[1], 8_000)] * 2}
    html, parsed = written(tmp_path, example(blocks=[gallery(images(), sounds=heard)]))
    before, after = html.split("<h3>After</h3>")
    assert [part.count("<audio controls") for part in (before, after)] == [1, 2]
    assert "media-src data:" in html and not parsed.external and html.count("data:audio/wav;base64,") == 3


# --- figures and tables


def test_figures_of_a_history():
    """Those whose keys some row has, in the order asked for; rows without a number are skipped, not taken for zero."""
    names = [figure.name for figure in history_figures(HISTORY, TILTING, t=T)]
    assert names == ["Reward", "Reward against KL", "KL to the base", "Loss", "Gradient norm", "Adjoint norm over t"]
    sampler = [{"energy": 3.0, "ess": 0.5}, {"energy": 2.0, "ess": None, "temperature": 1.0}]
    names = [figure.name for figure in history_figures(sampler, SAMPLING, {"energy": {"reference": 1.0}})]
    assert names == ["Energy", "Path weights", "Temperature"]
    assert training_blocks([], TILTING, t=T)[0].figures == [] and training_blocks([], TILTING, t=T)[1].rows == []


def test_a_curve_is_drawn_from_the_rows_that_have_it(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "curve", lambda x, series, *args: drawn.append((x, *series.values(), args[2])) or b"")
    rows = [{"a": 5.0}, {"a": None}, {"iteration": 7, "a": 6.0}]
    history_figures(rows, [Curve("a", "A", "", False, "")], {"a": {"before": 1.0}})
    assert drawn == [([0.0, 7.0], [5.0, 6.0], {"before": 1.0})]


def test_adjoint_norms_are_of_the_last_rounds():
    rows = [{"adjoint_norm": [float(i), 1.0]} for i in range(30)] + [{"loss": 1.0}]
    assert training_blocks(rows, (), t=(0.0, 1.0))[1].rows == [(0.0, 24.5), (1.0, 1.0)]


@pytest.mark.filterwarnings("error")
def test_laws_of_a_sampler(generator, monkeypatch):
    x = torch.randn(40, 4, 2, generator=generator)
    energy = torch.full((40,), NAN)
    laws = energy_figures({"samples": energy, "reference": None}) + distance_figures({"samples": x, "reference": x})
    laws += weight_figures(torch.softmax(x[:, 0, 0], 0))
    assert [law.name for law in laws] == ["Energies", "Distances of particles", "Sorted path weights"]
    assert all(pixels(law.png)[..., 3].max() > 0 for law in laws) and weight_figures(None) == []
    drawn = []
    monkeypatch.setattr(plots, "curve", lambda x, series, *args: drawn.append((x, *series.values())) or b"")
    weight_figures(torch.tensor([0.25, 0.75, 0.0, 0.0]))
    assert drawn == [([0.25, 0.5, 0.75, 1.0], [3.0, 1.0, 1e-6, 1e-6])]


def test_numbers_of_a_sampler():
    row = {"w2": 0.5, "w2_floor": 0.25, "w2_resampled": 0.375, "log_z": 1.0, "ess": None}
    assert sampler_numbers(row, 2.0) == [
        ("W2", 0.5, 0.25, 0.375), ("log Z from the sampler's paths", 1.0, 2.0, None),
    ]  # fmt: skip
    html = render(Page("t", "c", None, [sampler_table(row, None)]))
    assert "floor or exact" in html and 'value="0.375"' in html and "A floor is" in html


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
    write_page(tmp_path, example(TILTING))
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []

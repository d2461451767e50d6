"""Models of other libraries, against closed forms on Gaussian data.

The libraries are no dependency: `pip install --no-deps azula einops flow_matching` into .venv to run these tests.
"""

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Cosine, Linear
from tiltflow.core.ode import ode
from tiltflow.core.wrappers import from_azula, from_flow_matching

MEAN, STD = 2.0, 0.5


class Velocity(torch.nn.Module):
    """E[Ẋ_t | x] of N(2, .25) data on a path, in closed form."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, x, t, **extras):
        a, b, da, db = (f(t)[:, None] for f in (self.path.alpha, self.path.beta, self.path.d_alpha, self.path.d_beta))
        variance = (a * STD) ** 2 + b**2
        return da * MEAN + (da * a * STD**2 + db * b) / variance * (x - a * MEAN)


def generator():
    return torch.Generator().manual_seed(0)


def end(process):
    x0 = process.source(4_000, generator(), torch.float64)
    return ode(process, x0, 60)


@pytest.mark.parametrize("name", ["CondOTScheduler", "CosineScheduler"])
def test_flow_matching_models_end_at_the_data(name):
    """N(2, .25) through the ODE, 4,000 draws; the other path's scheduler does not end there."""
    library = pytest.importorskip("flow_matching.path.scheduler", reason="pip install --no-deps flow_matching")
    from flow_matching.utils import ModelWrapper

    path = Linear() if name == "CondOTScheduler" else Cosine()
    process = from_flow_matching(ModelWrapper(Velocity(path)), (1,), getattr(library, name)())
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    for mine, given in ((process.interpolant.alpha, path.alpha), (process.interpolant.d_beta, path.d_beta)):
        assert torch.allclose(mine(t), given(t))
    x = end(process)
    assert abs(float(x.mean()) - MEAN) < 0.03 and abs(float(x.std()) - STD) < 0.03
    other = from_flow_matching(process.model, (1,), library.PolynomialConvexScheduler(3))
    x, t = torch.ones(2, 1, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    assert not torch.allclose(process.x1(x, t), other.x1(x, t), atol=0.1)


@pytest.mark.parametrize("name", ["VPSchedule", "CosineSchedule", "RectifiedSchedule"])
def test_azula_denoisers_end_at_the_data(name):
    """The posterior mean in closed form; time turned the other way would end at the noise."""
    noise = pytest.importorskip("azula.noise", reason="pip install --no-deps azula einops")
    from azula.denoise import Denoiser, DiracPosterior

    class Exact(Denoiser):
        schedule = getattr(noise, name)()

        def forward(self, x_t, t, **kwargs):
            a, s = (v[:, None] for v in self.schedule(t))
            return DiracPosterior(MEAN + a * STD**2 / ((a * STD) ** 2 + s**2) * (x_t - a * MEAN))

    x = end(from_azula(Exact(), (1,)))
    assert abs(float(x.mean()) - MEAN) < 0.03 and abs(float(x.std()) - STD) < 0.03


def test_a_variance_exploding_schedule_is_refused():
    class Exploding(torch.nn.Module):
        schedule = staticmethod(lambda t: (torch.ones_like(t), 1e3**t))

    with pytest.raises(TiltflowError, match=r"starts at 1·X_1 \+ 1e\+03·X_0"):
        from_azula(Exploding(), (1,))
    with pytest.raises(TiltflowError, match="Linear has no schedule"):
        from_azula(torch.nn.Linear(1, 1), (1,))

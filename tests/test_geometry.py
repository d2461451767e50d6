"""State spaces: densities integrate to one, scores are their gradients, projections keep what they must."""

import math

import pytest
import torch

from tiltflow.core.errors import TiltflowError
from tiltflow.core.geometry import Centred, Euclidean, Torus, noise


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("geometry", [Euclidean(), Torus()])
@pytest.mark.parametrize("variance", [0.3, 4.0, 25.0])
def test_the_score_is_the_gradient_of_the_density(geometry, variance, generator):
    x = (3 * torch.randn(7, 2, generator=generator, dtype=torch.float64)).requires_grad_(True)
    (grad,) = torch.autograd.grad(geometry.log_normal(x, variance).sum(), x)
    assert torch.allclose(grad, geometry.normal_score(x.detach(), variance), atol=1e-10)


@pytest.mark.parametrize("variance", [0.3, 4.0, 25.0])
def test_the_wrapped_normal_integrates_to_one(variance):
    x = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)[:, None]
    assert abs(float(torch.trapezoid(Torus().log_normal(x, variance).exp(), x[:, 0])) - 1) < 1e-6
    plain = Euclidean().log_normal(x, variance).exp()
    if variance > 1:  # the known-bad twin: without its images the normal loses mass
        assert float(torch.trapezoid(plain, x[:, 0])) < 0.99


def test_wrapped_angles_stay_in_their_interval_and_keep_their_density(generator):
    x = 10 * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    wrapped = Torus().wrap(x)
    assert float(wrapped.min()) >= -math.pi and float(wrapped.max()) < math.pi
    assert torch.allclose(Torus().log_normal(x, 2.0), Torus().log_normal(wrapped, 2.0))


def test_lifted_end_points_have_the_law_of_the_ambient_base(generator):
    """Wrap an ambient normal, lift it again: the same law; without the windings its variance is far too small."""
    x = 4 * torch.randn(40_000, 1, generator=generator, dtype=torch.float64)
    lifted = Torus().lift(Torus().wrap(x), 16.0, generator)
    assert torch.allclose(Torus().wrap(lifted), Torus().wrap(x), atol=1e-9)
    assert abs(float(lifted.square().mean()) - 16) < 4 * 16 * (2 / 40_000) ** 0.5
    assert float(Torus().wrap(x).var()) < 5


def test_centred_noise_has_no_mean_and_the_right_dimension(generator):
    x = noise(Centred(), torch.zeros(20_000, 4, 2, dtype=torch.float64), generator)
    assert float(x.mean(1).abs().max()) < 1e-12
    assert Centred().dimension((4, 2)) == 6 and Centred().dimension((13, 3)) == 36
    squared = x.flatten(1).square().sum(1)
    assert abs(float(squared.mean()) - 6) < 4 * (12 / 20_000) ** 0.5  # chi-squared with 6 degrees of freedom, not 8


def test_the_centred_density_is_that_of_the_coordinates_on_the_subspace(generator):
    """log N in an orthonormal basis of the subspace."""
    x = noise(Centred(), torch.zeros(5, 3, 2, dtype=torch.float64), generator)
    basis = torch.tensor([[1, -1, 0], [1, 1, -2]], dtype=torch.float64)
    basis = basis / basis.norm(dim=1, keepdim=True)
    inside = torch.einsum("ij,bjm->bim", basis, x)
    assert torch.allclose(Centred().log_normal(x, 0.7), Euclidean().log_normal(inside, 0.7))


def test_centred_particles_need_two_axes():
    with pytest.raises(TiltflowError, match="shape"):
        Centred().dimension((4,))

r"""The ends of time: predictors whose conversion is 0/0 where α = 0 or β = 0, by their limits (l'Hôpital), never by an ε.

Where α = 0 < β (t = 0), x = βX_0 says nothing of X_1, so X̂_1(x) = E[X_1] for every x. A network that predicts the noise or
the score says it in the first order of t only: x − β·eps and x + β²s vanish there, so with c = −β or β² and out its output

    X̂_1 = lim (x + c·out)/α = (−(ċ/c) x + c ∂_t out)/α̇          (out(x, 0) is −x/c)

∂_t is taken by differentiating the network's vector–Jacobian product once more (PyTorch's forward mode cannot be
differentiated again through a softmax). That out(x, 0) is −x/c is *used*: a network's own error there, which would make the
limit infinite, does not enter, and :func:`tiltflow.verdict.check_base.check_base` reports it. The derivative of a trained
network may be far off (one with features of high frequency in t: by several spreads of the data); the check says that too,
and then only a network that predicts the velocity or x1 will do.

Where β = 0 (t = 1), x = X_1 is independent of X_0, so X̂_0 = 0, v = κx + ηs, and with (β²)˙ = −2η, (β²)¨ = 2β̇² if η = 0,

    s = −∂_t eps/β̇,    s = (v − κx)/η, or ∂_t(v − κx)/η̇ if η = 0,    s = −∂_t(αX̂_1)/(2η), or ½∂_t²(αX̂_1)/β̇² if η = 0

At the point source of Föllmer's path (α = β = 0, x = 0): X̂_1 = 2v/α̇ = (2η/α̇) s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiltflow.core.errors import TiltflowError
from tiltflow.core.interpolant import Interpolant

Field = Callable[[Tensor], Tensor]
"""t (B,) → (B, *event), at a fixed x."""
NEEDED = "what this network predicts is 0/0 at an end of time, and its limit needs the network's derivative in t"
CONVERT = "convert the network to predict the velocity or x1"


def slope(f: Field, t: Tensor) -> Tensor:
    """∂f/∂t, (B, *event), row by row; differentiable by autograd where gradients are on.

    ⟨w, f(t)⟩ has the gradient g(w) = Σ_event w ∂f/∂t in t, which is linear in w with the slope as its gradient.

    Raises:
        TiltflowError: f does not depend on t differentiably (integer timesteps, no_grad inside), or cannot be differentiated
            twice; or in ``torch.inference_mode``.
    """
    if torch.is_inference_mode_enabled():
        raise TiltflowError(f"{NEEDED}, which torch.inference_mode forbids; use torch.no_grad.")
    keep = torch.is_grad_enabled()
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
            time = t.detach().clone().requires_grad_(True) if not t.requires_grad else t
            out = f(time)
            w = torch.zeros_like(out, requires_grad=True)
            g = torch.autograd.grad(out, time, w, create_graph=True, allow_unused=True)[0] if out.requires_grad else None
            found = None if g is None else torch.autograd.grad(g.sum(), w, create_graph=keep)[0]
    except (RuntimeError, NotImplementedError) as error:
        if not any(word in str(error) for word in ("derivative", "differentia", "not require grad", "double backward")):
            raise
        why = str(error).splitlines()[0][:160]
        raise TiltflowError(f"{NEEDED}, which PyTorch cannot take here ({why}); {CONVERT}.") from error
    if found is None:
        raise TiltflowError(
            f"{NEEDED}, but its output does not depend on t differentiably (are its timesteps integers?); {CONVERT}, or use "
            "the interpolant that it was trained on, if its alpha_0 > 0."
        )
    return found


def x1_limit(f: Field, x: Tensor, t: Tensor, path: Interpolant, predicts: str) -> Tensor:
    """X̂_1 where α = 0, from an eps or score network f(t) at x; every t (B,) must be such a time."""
    alpha, beta, d_alpha, d_beta = (_like(v(t), x) for v in (path.alpha, path.beta, path.d_alpha, path.d_beta))
    if bool((alpha != 0).any()):
        raise TiltflowError("x1_limit is for times with alpha = 0.")
    if bool((beta == 0).any()):
        if predicts == "eps":
            raise TiltflowError(
                "a network that predicts the noise says nothing of the data at the point source of this path (x = 0 at "
                "t = 0); convert it to predict the velocity, the score or x1."
            )
        return 2 * _like(path.eta(t), x) / d_alpha * f(t)
    c, relative = (-beta, d_beta / beta) if predicts == "eps" else (beta**2, 2 * d_beta / beta)
    return (c * slope(f, t) - relative * x) / d_alpha


def score_limit(f: Field, x: Tensor, t: Tensor, path: Interpolant, predicts: str) -> Tensor:
    """∇log p_1(x) where β = 0, from any network f(t) at x; every t (B,) must be such a time."""
    if predicts == "score":
        return f(t)
    eta, d_beta = _like(path.eta(t), x), _like(path.d_beta(t), x)
    smooth = not bool((eta != 0).any())
    if predicts == "velocity":
        if not smooth:
            return (f(t) - _like(path.kappa(t), x) * x) / eta
        return slope(lambda s: f(s) - _like(path.kappa(s), x) * x, t) / slope(lambda s: _like(path.eta(s), x), t)
    if predicts == "eps":
        if not smooth:
            raise TiltflowError(
                "the score of a noise prediction has no limit at t = 1 on this path (eps vanishes like the square root of "
                "1 − t); evaluate it at t < 1."
            )
        return -slope(f, t) / d_beta
    if not smooth:
        return -slope(lambda s: _like(path.alpha(s), x) * f(s), t) / (2 * eta)
    return slope(lambda s: slope(lambda r: _like(path.alpha(r), x) * f(r), s), t) / (2 * d_beta**2)


def velocity_limit(f: Field, x: Tensor, t: Tensor, path: Interpolant, predicts: str) -> Tensor:
    """v = κx + ηs where β = 0; the score is needed only where η > 0 (VP, Föllmer)."""
    eta, drift = _like(path.eta(t), x), _like(path.kappa(t), x) * x
    return drift + eta * score_limit(f, x, t, path, predicts) if bool((eta != 0).any()) else drift


def _like(a: Tensor, x: Tensor) -> Tensor:
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim)).to(x.dtype)

"""The formulas of latent consistency distillation, each once, with the paper's symbols.

LCM: Luo et al. 2023, arXiv 2310.04378. A latent z_t = alpha_t z_0 + sigma_t eps; alpha_t^2 is `alphas_cumprod[t]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import LCMScheduler

from ..errors import PipelineError

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
"""As in diffusers' LCMScheduler (scheduling_lcm.py, get_scalings_for_boundary_condition_discrete): both must agree."""


def boundary_scalings(timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out (paper, section 3 and appendix): 1 and 0 at t = 0: the function is the identity there."""
    scaled = timesteps.double() * TIMESTEP_SCALING
    total = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


def expand(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(batch,) -> (batch, 1, 1, 1), on the device and in the dtype of `like`."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def pseudo_huber(
    prediction: torch.Tensor, target: torch.Tensor, c: float, per: Literal["element", "sample"] = "element"
) -> torch.Tensor:
    """Mean of sqrt(d^2 + c^2) - c, in float32.

    Args:
        prediction: (batch, ...).
        target: the same shape.
        c: below it errors count squared.
        per: of which d: of each element, or of each sample the root of the elements' mean square (ECT, arXiv
            2406.14548, has their sum, and a c that is larger by the same factor).
    """
    squares = (prediction.float() - target.float()).square()
    if per == "sample":
        squares = squares.flatten(1).mean(1)
    return ((squares + c**2).sqrt() - c).mean()


MOST_STEPS = 8


def few_steps(steps: int) -> list[int]:
    """The timesteps that LCMScheduler and TCDScheduler visit in so many steps, the noisiest first."""
    scheduler = LCMScheduler()
    scheduler.set_timesteps(steps)
    return [int(t) for t in scheduler.timesteps]


def visited(counts: Sequence[int] = range(1, MOST_STEPS + 1)) -> list[int]:
    """Every timestep that schedules of these numbers of steps visit, the noisiest first."""
    return sorted({t for count in counts for t in few_steps(count)}, reverse=True)


@dataclasses.dataclass(frozen=True)
class Solver:
    """The teacher's noise schedule, and a DDIM solver on `solver_steps` of its timesteps.

    Args:
        alphas_cumprod: of the teacher's training schedule, shape (1000,).
        prediction_type: what the UNet predicts, "epsilon" or "v_prediction".
        solver_steps: how many timesteps the solver has.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str
    solver_steps: int

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise PipelineError(
                f"the teacher predicts {self.prediction_type!r}; 'epsilon' or 'v_prediction' can be distilled."
            )
        if len(self.alphas_cumprod) != 1000:
            raise PipelineError(
                f"the teacher has {len(self.alphas_cumprod)} timesteps; 1000 are expected, as few-step samplers do."
            )
        if self.prediction_type == "epsilon" and self.alphas_cumprod[-1] < 1e-6:
            raise PipelineError(
                "the teacher predicts noise, on a schedule that ends in pure noise, where that says nothing of the "
                "picture: set rescale_betas_zero_snr=False in its scheduler."
            )
        if len(self.alphas_cumprod) % self.solver_steps:
            raise PipelineError(
                f"solver_steps={self.solver_steps} does not divide the teacher's {len(self.alphas_cumprod)} timesteps."
            )

    @property
    def skip(self) -> int:
        """Timesteps between two of the solver's: the paper's k, 20."""
        return len(self.alphas_cumprod) // self.solver_steps

    def timesteps(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t_{n+k}, t_n) of the solver's n-th interval, index in 0 .. solver_steps - 1; the first t_n is 0."""
        start = (index + 1) * self.skip - 1
        return start, (start - self.skip).clamp(min=0)

    @property
    def betas(self) -> Any:
        """The schedule as diffusers' schedulers take it (`trained_betas`); alpha is never quite 0 there."""
        alphas = self.alphas_cumprod.double().clamp(min=2**-24)
        return (1 - alphas / torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])).numpy()

    def alpha_sigma(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_t and sigma_t, shaped to multiply latents `like`."""
        squared = self.alphas_cumprod.double()[timesteps.cpu()]
        return expand(squared.sqrt(), like), expand((1 - squared).sqrt(), like)

    def noisy(self, z_0: torch.Tensor, eps: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t = alpha_t z_0 + sigma_t eps. With a predicted z_0 and eps this is the DDIM step to t."""
        alpha, sigma = self.alpha_sigma(timesteps, z_0)
        return alpha * z_0 + sigma * eps

    def split(
        self, prediction: torch.Tensor, z_t: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(z_0, eps) that a prediction of the UNet stands for."""
        alpha, sigma = self.alpha_sigma(timesteps, z_t)
        if self.prediction_type == "v_prediction":
            return alpha * z_t - sigma * prediction, alpha * prediction + sigma * z_t
        return (z_t - sigma * prediction) / alpha, prediction

    def consistency(self, prediction: torch.Tensor, z_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """f(z_t, t) = c_skip z_t + c_out z_0 (paper, equation 9)."""
        c_skip, c_out = boundary_scalings(timesteps)
        return expand(c_skip, z_t) * z_t + expand(c_out, z_t) * self.split(prediction, z_t, timesteps)[0]

"""A training step in PyTorch: what step_time compares ours with. The same losses, RAdam and averages."""

import copy
import functools
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cm_jax.diffusion.noise_schedule import KarrasGrid
from cm_jax.networks import ADMUNet
from cm_jax.training.config import TrainConfig
from cm_jax.training.ema import ConstantEMA
from cm_jax.types import Params

SIGMA_DATA, SIGMA_MIN = 0.5, 0.002


class Drawn(NamedTuple):
    """What chance decides in a batch: levels t and r of every image (r = 0 for a denoiser), and NHWC noise."""

    t: np.ndarray
    r: np.ndarray
    noise: np.ndarray


class DiffusersADM(nn.Module):
    """diffusers' UNet2DModel with these parameters, called as TorchUNet is."""

    def __init__(self, network: ADMUNet, params: Params) -> None:
        from cm_jax.conversion.diffusers import DIFFUSERS
        from cm_jax.conversion.parity import reference_network
        from cm_jax.conversion.rules import to_source

        super().__init__()
        self.unet = reference_network(network, to_source(DIFFUSERS.rules(network), params))

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.unet(x, c_noise, class_labels=labels).sample


class TorchTraining:
    """EDM's denoising, or consistency distillation by Heun's teacher steps, as `chosen` says; the model is the student.

    Parameters and averages are float32; with bfloat16, autocast chooses what is computed in it. `compiled`: what
    torch.compile is told, for the student, the teacher and the target.
    """

    def __init__(
        self,
        chosen: TrainConfig,
        model: nn.Module,
        images: np.ndarray,
        labels: np.ndarray | None,
        *,
        device: str = "cpu",
        layout: torch.memory_format = torch.contiguous_format,
        compiled: dict[str, str] | Literal[False] = False,
    ) -> None:
        objective, preconditioning = cast(Any, chosen.objective), cast(Any, chosen.preconditioning)
        self.scaled = functools.partial(_scaled, preconditioning.time_factor)
        (average,) = chosen.all_averages
        assert isinstance(average, ConstantEMA)
        student = copy.deepcopy(model).requires_grad_(True).train()
        for parameter in student.parameters():
            parameter.data = parameter.data.contiguous()  # they were transposed views
        student = student.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.student = student

        def ready(module: nn.Module) -> Any:
            return module if compiled is False else torch.compile(module, dynamic=False, **cast(Any, compiled))

        self.forward = ready(student)
        self.average = _fixed(student)
        self.keep = get_ema_multi_avg_fn(average.beta)
        self.teacher = None
        if objective.has_teacher:
            assert chosen.target is not None
            self.teacher, self.target = _fixed(student), _fixed(student)
            self.teach, self.lag = ready(self.teacher), ready(self.target)
            self.follow = get_ema_multi_avg_fn(float(chosen.target(0)))
            grid = KarrasGrid(levels=int(objective.curriculum(0)))
            self.grid = torch.from_numpy(grid.descending(grid.levels)).to(device)
        else:
            self.noise_distribution = objective.noise_distribution
        optimizer = chosen.optimizer
        self.optimizer = torch.optim.RAdam(
            student.parameters(), optimizer.learning_rate.peak, (optimizer.beta1, optimizer.beta2), optimizer.epsilon
        )
        self.device, self.layout, self.half = device, layout, chosen.network.precision == "bfloat16"
        self.images, self.labels = images, labels

    def __call__(self, drawn: Drawn | None = None) -> float:
        """One step, with these draws or its own; its loss."""
        clean = _planar(torch.from_numpy(self.images).to(self.device).float() / 127.5 - 1, self.layout)
        labels = None if self.labels is None else torch.from_numpy(self.labels).long().to(self.device)
        t, r, noise = self._draw(clean) if drawn is None else self._given(drawn)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            loss = self._loss(clean, t, r, noise, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self._move(self.average, self.keep)
            if self.teacher is not None:
                self._move(self.target, self.follow)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def _loss(self, clean: Tensor, t: Tensor, r: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        x = clean + _per_image(t) * noise
        if self.teacher is None:
            weight = t**-2 + SIGMA_DATA**-2
            return (weight * (self.scaled(self.forward, x, t, labels) - clean).square().mean((1, 2, 3))).mean()
        with torch.no_grad():
            first = (x - self.scaled(self.teach, x, t, labels)) / _per_image(t)
            euler = x + _per_image(r - t) * first
            second = (euler - self.scaled(self.teach, euler, r, labels)) / _per_image(r)
            x_r = x + _per_image(r - t) * (first + second) / 2
            behind = self.scaled(self.lag, x_r, r, labels, SIGMA_MIN)
        return (self.scaled(self.forward, x, t, labels, SIGMA_MIN) - behind).square().mean()

    def _draw(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.randn_like(clean)
        if self.teacher is None:
            t = (
                self.noise_distribution.mean + self.noise_distribution.std * torch.randn(len(clean), device=self.device)
            ).exp()
            return t, 0 * t, noise
        index = torch.randint(len(self.grid) - 1, (len(clean),), device=self.device)
        return self.grid[index], self.grid[index + 1], noise

    def _given(self, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
        t, r, noise = (torch.from_numpy(np.array(values)).to(self.device) for values in drawn)
        return t, r, _planar(noise, self.layout)

    def _move(self, average: nn.Module, move: Any) -> None:
        move(list(average.parameters()), list(self.student.parameters()), None)


def _fixed(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def _planar(images: Tensor, layout: torch.memory_format) -> Tensor:
    return images.permute(0, 3, 1, 2).contiguous(memory_format=layout)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _scaled(
    time_factor: float, model: Any, x: Tensor, sigma: Tensor, labels: Tensor | None, least: float = 0.0
) -> Tensor:
    """c_skip x + c_out F(c_in x, factor times ln sigma): a denoiser, or with `least` = sigma_min consistent."""
    root = _per_image((sigma**2 + SIGMA_DATA**2).sqrt())
    above = _per_image(sigma - least)
    raw = model(x / root, time_factor * sigma.log(), labels).float()
    return SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2) * x + above * SIGMA_DATA / root * raw

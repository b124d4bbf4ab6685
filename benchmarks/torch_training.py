"""A training step in PyTorch with the losses, RAdam and EMA of cm_jax; used by step_time."""

import copy
import functools
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cm_jax.networks import ADMUNet
from cm_jax.training.config import TrainConfig
from cm_jax.training.ema import ConstantEMA
from cm_jax.types import Params

SIGMA_DATA, SIGMA_MIN = 0.5, 0.002


class NoiseSample(NamedTuple):
    """Random values of a batch: noise levels t and r per image (r = 0 for EDM), and NHWC standard normal noise."""

    t: np.ndarray
    r: np.ndarray
    noise: np.ndarray


class DiffusersADM(nn.Module):
    """The UNet2DModel of diffusers with the parameters of `network` and the call signature of TorchUNet."""

    def __init__(self, network: ADMUNet, params: Params) -> None:
        from cm_jax.conversion.parity import reference_network
        from cm_jax.conversion.rules import to_source
        from cm_jax.conversion.unet_format import DIFFUSERS

        super().__init__()
        self.unet = reference_network(network, to_source(DIFFUSERS.rules(network), params))

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.unet(x, c_noise, class_labels=labels).sample


class TorchStep:
    """EDM denoising, or consistency distillation with a Heun ODE step, as configured by `config`.

    `model` is the student's initial network. Parameters and EMA are float32; bfloat16 uses autocast. `compiled` holds
    the options of `torch.compile` for student, teacher and target.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        images: np.ndarray,
        labels: np.ndarray | None,
        *,
        device: str = "cpu",
        layout: torch.memory_format = torch.contiguous_format,
        compiled: dict[str, str] | Literal[False] = False,
    ) -> None:
        objective, preconditioning = cast(Any, config.objective), cast(Any, config.preconditioning)
        self.preconditioned = functools.partial(_preconditioned, preconditioning.time_factor)
        (average,) = config.emas
        assert isinstance(average, ConstantEMA)
        student = copy.deepcopy(model).requires_grad_(True).train()
        for parameter in student.parameters():
            parameter.data = parameter.data.contiguous()  # transposed views otherwise
        student = student.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.student = student

        def wrapped(module: nn.Module) -> Any:
            return module if compiled is False else torch.compile(module, dynamic=False, **cast(Any, compiled))

        self.forward = wrapped(student)
        self.ema = _frozen(student)
        self.update_ema = get_ema_multi_avg_fn(average.decay)
        self.teacher = None
        if objective.has_teacher:
            assert config.target_ema is not None
            self.teacher, self.target = _frozen(student), _frozen(student)
            self.teacher_forward, self.target_forward = wrapped(self.teacher), wrapped(self.target)
            self.update_target = get_ema_multi_avg_fn(float(config.target_ema(0, objective.curriculum)))
            levels = config.schedule.descending(int(objective.curriculum(0)))
            self.levels = torch.from_numpy(levels).to(device)
        else:
            self.noise_distribution = objective.noise_distribution
        optimizer = config.optimizer
        self.optimizer = torch.optim.RAdam(
            student.parameters(), optimizer.learning_rate.peak, (optimizer.beta1, optimizer.beta2), optimizer.epsilon
        )
        self.device, self.layout, self.autocast = device, layout, config.network.precision == "bfloat16"
        self.images, self.labels = images, labels

    def __call__(self, sample: NoiseSample | None = None) -> float:
        """Perform a step with the given or newly sampled noise; returns the loss."""
        clean = _planar(torch.from_numpy(self.images).to(self.device).float() / 127.5 - 1, self.layout)
        labels = None if self.labels is None else torch.from_numpy(self.labels).long().to(self.device)
        t, r, noise = self._sample(clean) if sample is None else self._to_device(sample)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self._loss(clean, t, r, noise, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self._update_ema(self.ema, self.update_ema)
            if self.teacher is not None:
                self._update_ema(self.target, self.update_target)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def _loss(self, clean: Tensor, t: Tensor, r: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        x = clean + _per_image(t) * noise
        if self.teacher is None:
            weight = t**-2 + SIGMA_DATA**-2
            return (weight * (self.preconditioned(self.forward, x, t, labels) - clean).square().mean((1, 2, 3))).mean()
        with torch.no_grad():
            first = (x - self.preconditioned(self.teacher_forward, x, t, labels)) / _per_image(t)
            euler = x + _per_image(r - t) * first
            second = (euler - self.preconditioned(self.teacher_forward, euler, r, labels)) / _per_image(r)
            x_r = x + _per_image(r - t) * (first + second) / 2
            target = self.preconditioned(self.target_forward, x_r, r, labels, SIGMA_MIN)
        return (self.preconditioned(self.forward, x, t, labels, SIGMA_MIN) - target).square().mean()

    def _sample(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.randn_like(clean)
        if self.teacher is None:
            t = (
                self.noise_distribution.mean + self.noise_distribution.std * torch.randn(len(clean), device=self.device)
            ).exp()
            return t, 0 * t, noise
        index = torch.randint(len(self.levels) - 1, (len(clean),), device=self.device)
        return self.levels[index], self.levels[index + 1], noise

    def _to_device(self, sample: NoiseSample) -> tuple[Tensor, Tensor, Tensor]:
        t, r, noise = (torch.from_numpy(np.array(values)).to(self.device) for values in sample)
        return t, r, _planar(noise, self.layout)

    def _update_ema(self, ema: nn.Module, update: Any) -> None:
        update(list(ema.parameters()), list(self.student.parameters()), None)


def _frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def _planar(images: Tensor, layout: torch.memory_format) -> Tensor:
    return images.permute(0, 3, 1, 2).contiguous(memory_format=layout)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _preconditioned(
    time_factor: float, model: Any, x: Tensor, sigma: Tensor, labels: Tensor | None, sigma_min: float = 0.0
) -> Tensor:
    """c_skip x + c_out F(c_in x, time_factor ln sigma): a denoiser (sigma_min = 0) or a consistency function."""
    root = _per_image((sigma**2 + SIGMA_DATA**2).sqrt())
    above = _per_image(sigma - sigma_min)
    raw = model(x / root, time_factor * sigma.log(), labels).float()
    return SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2) * x + above * SIGMA_DATA / root * raw

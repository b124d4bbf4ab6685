"""Optimizers as optax transformations: learning-rate schedules, Adam, AdamW, and RAdam as PyTorch computes it."""

import abc
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cm_jax.diffusion.curricula import StepSchedule
from cm_jax.errors import InputError
from cm_jax.types import Params


@dataclasses.dataclass(frozen=True)
class LearningRate(abc.ABC):
    """Linear warm-up from zero to `peak`, then the schedule of the subclass."""

    peak: float = 1e-4
    """Largest learning rate."""
    warm_up: int = 0
    """Warm-up steps; the first has rate peak / warm_up."""

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf or self.warm_up < 0 or getattr(self, "steps", 1) < 1:
            raise InputError(f"Expected a learning rate with peak > 0, warm_up >= 0 and steps >= 1, got {self}.")

    def schedule(self) -> optax.Schedule:
        """k -> learning rate after k steps; k may be traced."""
        after = self.after_warm_up()
        if not self.warm_up:
            return after
        rising = optax.linear_schedule(self.peak / self.warm_up, self.peak, max(1, self.warm_up - 1))
        return optax.join_schedules([rising, after], [self.warm_up])

    @abc.abstractmethod
    def after_warm_up(self) -> optax.Schedule: ...


@dataclasses.dataclass(frozen=True)
class ConstantRate(LearningRate):
    """Constant at the peak: CM, iCT, and ECT for CIFAR-10."""

    def after_warm_up(self) -> optax.Schedule:
        return optax.constant_schedule(self.peak)


@dataclasses.dataclass(frozen=True)
class _FiniteDecay(LearningRate, StepSchedule):
    steps: int = 100_000
    """Steps from the end of the warm-up until the rate is zero."""

    @property
    def duration(self) -> int:
        return self.warm_up + self.steps


@dataclasses.dataclass(frozen=True)
class LinearDecay(_FiniteDecay):
    """Linear decay to zero."""

    def after_warm_up(self) -> optax.Schedule:
        return optax.linear_schedule(self.peak, 0.0, self.steps)


@dataclasses.dataclass(frozen=True)
class CosineDecay(_FiniteDecay):
    """Half-cosine decay to zero."""

    def after_warm_up(self) -> optax.Schedule:
        return optax.cosine_decay_schedule(self.peak, self.steps)


@dataclasses.dataclass(frozen=True)
class InverseRootDecay(LearningRate):
    """peak / sqrt(max(1, k / steps)), with k counted from the end of the warm-up (EDM2; ECT and sCM on ImageNet)."""

    steps: int = 35_000
    """Steps at the peak."""

    def after_warm_up(self) -> optax.Schedule:
        return lambda count: self.peak / jnp.sqrt(jnp.maximum(1.0, count / self.steps))


AnyLearningRate = ConstantRate | LinearDecay | CosineDecay | InverseRootDecay | LearningRate


@dataclasses.dataclass(frozen=True)
class Optimizer(abc.ABC):
    """An optax gradient transformation with a learning-rate schedule and optional clipping."""

    learning_rate: AnyLearningRate = ConstantRate()
    """Learning rate as a function of the step."""
    beta1: float = 0.9
    """Decay of the first-moment estimate."""
    beta2: float = 0.999
    """Decay of the second-moment estimate."""
    epsilon: float = 1e-8
    """Term added to the denominator."""
    clip_norm: float | None = None
    """Maximum global gradient norm; larger gradients are scaled down. None: no clipping."""

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 < self.beta2 < 1 and self.epsilon > 0):
            raise InputError(f"Expected an optimizer with 0 <= beta1 < 1, 0 < beta2 < 1 and epsilon > 0, got {self}.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"Expected clip_norm > 0, or None for no clipping, got {self.clip_norm}.")

    def transformation(self) -> optax.GradientTransformation:
        clip = [] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]
        return optax.chain(*clip, *self.core(), optax.scale_by_learning_rate(self.learning_rate.schedule()))

    @abc.abstractmethod
    def core(self) -> tuple[optax.GradientTransformation, ...]:
        """Transformations between clipping and the learning rate."""


@dataclasses.dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015)."""

    def core(self) -> tuple[optax.GradientTransformation, ...]:
        return (optax.scale_by_adam(self.beta1, self.beta2, self.epsilon),)


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    weight_decay: float = 0.01
    """Decoupled weight decay, multiplied by the learning rate."""

    def core(self) -> tuple[optax.GradientTransformation, ...]:
        return optax.scale_by_adam(self.beta1, self.beta2, self.epsilon), optax.add_decayed_weights(self.weight_decay)


@dataclasses.dataclass(frozen=True)
class RAdam(Optimizer):
    """Rectified Adam (Liu et al. 2020), equal to torch.optim.RAdam; all published consistency models used it.

    In the first five steps, before the variance is tractable, it is SGD with momentum.
    """

    weight_decay: float = 0.0
    """L2 penalty: this times the parameters is added to the gradients."""

    def core(self) -> tuple[optax.GradientTransformation, ...]:
        decay = (optax.add_decayed_weights(self.weight_decay),) if self.weight_decay else ()
        return (*decay, scale_by_radam(self.beta1, self.beta2, self.epsilon))


AnyOptimizer = Adam | AdamW | RAdam | Optimizer


class RAdamState(NamedTuple):
    steps: Int[Array, ""]
    mean: Params
    square: Params


def scale_by_radam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """m^ r_t sqrt(1 - beta2^t) / (sqrt(v) + epsilon), and m^ alone while rho_t <= 5.

    optax.scale_by_radam differs: it computes rho_t as a difference in single precision, whose cancellation makes the
    first rectified step 1.2 % too small, and it adds epsilon after the bias correction (PyTorch: before).
    """
    longest = 2 / (1 - beta2) - 1  # rho_inf

    def init(params: Params) -> RAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return RAdamState(jnp.int32(0), zeros, zeros)

    def update(updates: Params, state: RAdamState, params: Params | None = None) -> tuple[Params, RAdamState]:
        mean = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mean, updates)
        square = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * jnp.square(g), state.square, updates)
        steps = state.steps + 1
        rho, correction = variance_length(steps, beta2), -jnp.expm1(steps * math.log(beta2))
        ratio = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * jnp.where(rho > 5, rho, 6))
        scale = jnp.where(rho > 5, jnp.sqrt(ratio) * jnp.sqrt(correction), 0)
        unbias = -1 / jnp.expm1(steps * math.log(beta1)) if beta1 else 1.0

        def step(m: Array, v: Array) -> Array:
            return unbias * m * jnp.where(rho > 5, scale / (jnp.sqrt(v) + epsilon), 1)

        return jax.tree.map(step, mean, square), RAdamState(steps, mean, square)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def variance_length(step: Int[Array, ""], beta2: float) -> Float[Array, ""]:
    """rho_t = 2 / (1 - beta2) - 1 - 2 t beta2^t / (1 - beta2^t), accurate in single precision.

    With y = -t ln beta2, beta2^t / (1 - beta2^t) = 1 / (e^y - 1), so rho_t is a constant plus
    2 / -ln beta2 (1 - y / (e^y - 1)); for small y the bracket is y/2 - y^2/12 + y^4/720 - ...
    """
    decay = -math.log(beta2)
    constant = 2 / (1 - beta2) - 1 - 2 / decay
    y = step * decay
    near = y / 2 - y**2 / 12 + y**4 / 720 - y**6 / 30240
    far = 1 - y / jnp.expm1(jnp.maximum(y, 0.5))
    return constant + 2 / decay * jnp.where(y < 0.5, near, far)

"""What a run measures of its own images while it trains: the settings, and all that is needed for it, checked."""

import dataclasses
from typing import ClassVar, Literal

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.data import Dataset
from cm_jax.errors import InputError, check_int
from cm_jax.evaluation.evaluate import EvalConfig, check, evaluate, format_values
from cm_jax.evaluation.feature_extractor import FeatureExtractor, FeatureStatistics, load_inception
from cm_jax.evaluation.image_sets import ImageSet, of_dataset, of_model
from cm_jax.evaluation.references import cached_statistics, default_cache, open_reference
from cm_jax.model import Model
from cm_jax.types import Params

PARAMETERS = "parameters"
"""In place of an average's name: the parameters themselves."""

_LEADING = {"fid": "fid", "sfid": "sfid", "kid": "kid", "is": "inception_score"}
"""Metrics by which one checkpoint is better than another, and their values' names."""
_STEPS_OF_A_DENOISER = 18
_OWN = "the run's own images"


@dataclasses.dataclass(frozen=True)
class PeriodicEvaluation:
    """Images are drawn and judged every so often; the checkpoint that the first metric finds best is kept."""

    every: int = 500_000
    """Images seen between evaluations. One more is made at the end."""
    count: int = 10_000
    """Images that are drawn for one."""
    steps: tuple[int, ...] = ()
    """Steps to draw in, of the consistency sampler, or of Heun's for a denoiser; of several numbers, each is evaluated,
    and the first one chooses the best. Default: 1, or 18 for a denoiser."""
    metrics: tuple[Literal["fid", "sfid", "kid", "is", "pr", "prdc"], ...] = ("fid",)
    """As of `evaluate`. The first one chooses the best, and must be fid, sfid, kid or is."""
    reference: str = ""
    """As of `evaluate`: emoji:held_out, tfds:NAME, a folder, an .npz file of images or statistics. Default: the images
    that the run learns from."""
    average: str = ""
    """Name of the average that is evaluated and, then, drawn from: exponential_0.9999, power_0.1, or "parameters" for
    the parameters themselves. Default: the first average."""
    inception: str = ""
    """Weights of Inception-V3. Default: what CM_JAX_INCEPTION names."""
    seed: int = 0
    """Of the images drawn: the same ones every time."""

    FREE: ClassVar[tuple[str, ...]] = ("every", "inception")
    """What may change from one evaluation of a run to the next."""

    def __post_init__(self) -> None:
        check_int("every", self.every, 1, 10**15)
        check_int("count", self.count, 2, 10**9)
        check_int("seed", self.seed, 0, 2**32 - 1)
        for steps in self.steps:
            check_int("steps", steps, 1, 10**6)
        if len(set(self.steps)) < len(self.steps):
            raise InputError(f"steps has a number twice: {', '.join(map(str, self.steps))}.")
        first = EvalConfig(self.metrics).metrics[0]
        if first not in _LEADING:
            raise InputError(
                f"metrics begins with {first}, which is several numbers, and the first metric chooses the best "
                f"checkpoint: put one of {', '.join(_LEADING)} before it."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """An evaluation that can be made of any parameters: weights read, reference opened, everything checked."""

    settings: PeriodicEvaluation
    config: ModelConfig
    extractor: FeatureExtractor
    reference: ImageSet | FeatureStatistics
    reference_name: str

    @property
    def steps(self) -> tuple[int, ...]:
        return self.settings.steps or (1 if self.config.distilled else _STEPS_OF_A_DENOISER,)

    @property
    def leading(self) -> str:
        """The value that chooses the best checkpoint."""
        return _column(_LEADING[self.settings.metrics[0]], self.steps[0])

    @property
    def rising(self) -> bool:
        """Whether more is better."""
        return self.settings.metrics[0] == "is"

    @property
    def description(self) -> str:
        chosen = self.settings
        ways = " and ".join(map(_in_steps, self.steps))
        return (
            f"{', '.join(chosen.metrics)} of {chosen.count:,} images {ways}, against {self.reference_name}, every "
            f"{chosen.every:,} images; the best is kept by {self.leading}"
        )

    def look(self) -> FeatureStatistics:
        """The reference, as the metrics need it."""
        if isinstance(self.reference, FeatureStatistics):
            return self.reference
        needs = EvalConfig(self.settings.metrics).reference_needs
        return cached_statistics(self.extractor, self.reference, needs, cache=default_cache())

    def samples(self, params: Params, steps: int) -> ImageSet:
        """What `cm_jax.load` would draw from a checkpoint with these parameters."""
        network = self.config.network.at_precision("float32")
        model = Model(dataclasses.replace(self.config, network=network), network.prepare(params))
        return of_model(model, model.plan(steps=steps), self.settings.count, seed=self.settings.seed, name="the run")

    def measure(self, params: Params, known: FeatureStatistics) -> tuple[dict[str, float], str]:
        """{"fid_1_step": 12.3, ...}, and the same in words, of what is drawn with `params`; `known` is the reference.

        Raises InputError for a network that diverged.
        """
        found: dict[str, float] = {}
        words = []
        for steps in self.steps:
            samples, eval_config = self.samples(params, steps), EvalConfig(self.settings.metrics)
            report, _ = evaluate(self.extractor, samples, known, eval_config, reference_name=self.reference_name)
            found |= {_column(name, steps): value for name, value in report.values.items()}
            words.append(f"{format_values(report.values)} {_in_steps(steps)}")
        return found, "; ".join(words)


def make_ready(chosen: PeriodicEvaluation, config: ModelConfig, own: Dataset) -> Evaluator:
    """own: the run's data. Raises InputError where the evaluation could not be made: no weights, too few images, ..."""
    extractor, eval_config = load_inception(chosen.inception), EvalConfig(chosen.metrics)
    if chosen.reference:
        reference = open_reference(chosen.reference, eval_config.reference_needs, config.network.image_shape)
    else:
        reference = of_dataset(own, _OWN)
    ready = Evaluator(chosen, config, extractor, reference, chosen.reference or _OWN)
    for steps in ready.steps:
        check(extractor, _promised(config, chosen.count, steps), reference, eval_config, ready.reference_name)
    return ready


def _promised(config: ModelConfig, count: int, steps: int) -> ImageSet:
    """What will be drawn, before there are parameters."""
    model = Model(config, {})
    return of_model(model, model.plan(steps=steps), count, name="the evaluation (--evaluation.count)")


def _in_steps(steps: int) -> str:
    return f"in {steps} step{'s' if steps > 1 else ''}"


def _column(name: str, steps: int) -> str:
    return f"{name}_{steps}_step{'s' if steps > 1 else ''}"

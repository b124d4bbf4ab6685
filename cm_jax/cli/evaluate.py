"""`evaluate`: samples, or what a checkpoint draws, against a reference."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cm_jax.checkpoints.resolve import resolve
from cm_jax.cli.parsing import numbers
from cm_jax.cli.running import devices, progress, say, use_compilation_cache
from cm_jax.errors import InputError
from cm_jax.evaluation.evaluate import NEEDS, EvalConfig, evaluate
from cm_jax.evaluation.feature_extractor import load_inception
from cm_jax.evaluation.image_sets import ImageSet, holds_images, of_dataset, of_model, open_images
from cm_jax.evaluation.likelihood import evaluate_bits
from cm_jax.evaluation.references import default_cache, open_reference, write_statistics
from cm_jax.evaluation.report import Report, to_json
from cm_jax.io.atomic import atomic_write, check_writable
from cm_jax.loading import load
from cm_jax.model import Model
from cm_jax.types import Precision

_COUNT = 50_000
"""Of images drawn from a checkpoint where no number is given: the field's habit."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Judge samples, or what a checkpoint draws, against a reference: FID, sFID, KID, IS, precision and recall, bits.

    A checkpoint is sampled straight into the metrics; no image is written. The last line names the protocol.
    """

    samples: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SAMPLES_OR_CHECKPOINT")]
    """An .npz file (arr_0) or a folder of images; or what `sample` draws from. emoji:held_out, tfds:NAME work too."""
    reference: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REFERENCE")]
    """emoji, emoji:held_out, emoji:all, tfds:NAME or tfds:NAME:SPLIT, a folder, or an .npz file with arr_0, or with mu
    and sigma (mu_s and sigma_s) of the original evaluator."""
    metrics: str = "fid"
    """With commas between: fid, sfid, kid, is, pr (precision and recall by 3 neighbours), prdc (with density and
    coverage, by 5), bpd (bits per dimension that a denoiser gives the reference)."""
    count: int | None = None
    """Number of images. Default: all of a file's; 50,000 of a checkpoint's. For bpd: of the reference's."""
    inception: str = ""
    """Weights of Inception-V3, as `convert --to inception` writes them. Default: what CM_JAX_INCEPTION names."""
    steps: int | None = None
    """Of a checkpoint: number of steps, as `sample` takes it; so are the next ones."""
    timesteps: str = ""
    """Grid indices as diffusers writes them: "22,0"."""
    indices: str = ""
    """Grid indices as the original writes them: "0,22,39"."""
    sigmas: str = ""
    """Noise levels, falling: "80,1.38"."""
    sampler: Literal["", "consistency", "heun", "euler", "dpm", "ancestral", "progdist"] = ""
    """Default: consistency, or heun for a model with EDM scalings."""
    seed: int = 0
    """Of the images drawn."""
    precision: Precision = "float32"
    """Of the products inside the checkpoint's network."""
    batch_size: int | None = None
    """Images seen at once over all devices. Default: 32 a device."""
    likelihood_steps: int = 64
    """Heun steps of bpd, two calls of the denoiser and its derivative each."""
    output: Path | None = None
    """A JSON file with all numbers and the protocol."""
    save_reference: Path | None = None
    """An .npz file with mu and sigma of the reference, which the original evaluator reads."""
    reference_cache: str = ""
    """Folder in which statistics of references are kept by content, or "off". Default: in the user's cache folder."""
    compilation_cache: str = ""
    """Folder in which compiled programs are kept from run to run, or "off". Default: in the user's cache folder."""


def evaluate_command(arguments: Evaluate) -> None:
    """Read, draw, look, measure, and say the result in one line."""
    use_compilation_cache(arguments.compilation_cache)
    for path in (arguments.output, arguments.save_reference):
        if path is not None:
            check_writable(path, folder=False)
    metrics = tuple(dict.fromkeys(word.strip().lower() for word in arguments.metrics.split(",")))
    unknown = [metric for metric in metrics if metric not in (*NEEDS, "bpd")]
    if unknown:
        raise InputError(f"Unknown metric {unknown[0]!r}: choose from {', '.join(NEEDS)}, bpd.")
    model = None if _are_images(arguments) else load(resolve(arguments.samples), precision=arguments.precision)
    others = tuple(metric for metric in metrics if metric != "bpd")
    if arguments.save_reference is not None and not {"fid", "sfid"} & set(others):
        raise InputError("--save-reference writes what fid or sfid needs: add one of them to --metrics.")
    reports = [_compared(arguments, model, EvalConfig(others))] if others else []
    if "bpd" in metrics:
        reports.append(_bits(arguments, model))
    if arguments.output is not None:
        with atomic_write(arguments.output) as beside:
            beside.write_text(to_json(reports), "utf-8")
    for report in reports:
        say(report.line)


def _compared(arguments: Evaluate, model: Model | None, eval_config: EvalConfig) -> Report:
    extractor = load_inception(arguments.inception)
    samples = _samples(arguments, model)
    reference = open_reference(arguments.reference, eval_config.reference_needs, samples.shape)
    name = "off" if arguments.reference_cache == "off" else arguments.reference_cache or str(default_cache())
    against = reference.name if isinstance(reference, ImageSet) else arguments.reference
    say(f"Judging {samples.count:,} images of {samples.name} against {against}, by {extractor.name}, on {devices()}.")
    report, known = evaluate(
        extractor,
        samples,
        reference,
        eval_config,
        reference_name=against,
        cache=None if name == "off" else Path(name),
        batch_size=arguments.batch_size,
        watch=progress,
    )
    if arguments.save_reference is not None:
        write_statistics(arguments.save_reference, known)
    return report


def _are_images(arguments: Evaluate) -> bool:
    """Whether samples are given. Raises InputError for options that belong to a checkpoint then."""
    if not holds_images(arguments.samples):
        return False
    named = ("steps", "timesteps", "indices", "sigmas", "sampler")
    given = [name for name in named if getattr(arguments, name)]
    if given:
        raise InputError(f"--{given[0]} is about a checkpoint, and {arguments.samples} holds images: leave it out.")
    return True


def _samples(arguments: Evaluate, model: Model | None) -> ImageSet:
    if model is None:
        return of_dataset(open_images(arguments.samples), arguments.samples, arguments.count)
    plan = model.plan(
        steps=arguments.steps,
        timesteps=numbers("timesteps", arguments.timesteps, int),
        indices=numbers("indices", arguments.indices, int),
        sigmas=numbers("sigmas", arguments.sigmas, float),
        sampler=arguments.sampler or None,
    )
    count = _COUNT if arguments.count is None else arguments.count
    return of_model(model, plan, count, seed=arguments.seed, batch_size=arguments.batch_size, name=arguments.samples)


def _bits(arguments: Evaluate, model: Model | None) -> Report:
    if model is None:
        raise InputError(f"bpd is about a checkpoint, and {arguments.samples} holds images.")
    dataset = open_images(arguments.reference, model.config.network.image_shape)
    return evaluate_bits(
        model,
        dataset,
        None if arguments.count is None else min(arguments.count, dataset.size),
        seed=arguments.seed,
        steps=arguments.likelihood_steps,
        batch_size=arguments.batch_size,
        names=(arguments.samples, arguments.reference),
        watch=progress,
    )

"""`evaluate`: metrics of samples or of a checkpoint against a reference."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from cm_jax.checkpoints.published import resolve
from cm_jax.cli.distributed import Devices
from cm_jax.cli.options import Network, Sampling, Statistics, WhichWeights
from cm_jax.cli.parsing import parse
from cm_jax.cli.running import described, say, use_compilation_cache
from cm_jax.errors import InputError
from cm_jax.evaluation.evaluate import NEEDS, EvalConfig, evaluate
from cm_jax.evaluation.features import load_inception, open_reference, write_statistics
from cm_jax.evaluation.image_sets import holds_images, of_dataset, of_model, open_images
from cm_jax.evaluation.likelihood import evaluate_bits
from cm_jax.evaluation.metrics import Report, to_json
from cm_jax.io.atomic import atomic_write, check_writable
from cm_jax.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Sampling, WhichWeights, Devices, Statistics, Network):
    """Evaluate samples or a checkpoint against a reference: FID, sFID, KID, IS, precision and recall, bits/dim.

    Images sampled from a checkpoint are not written to disk. The last line printed names the evaluation settings.
    """

    samples: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SAMPLES_OR_CHECKPOINT")]
    """An .npz file (arr_0), a folder of images, a checkpoint as for `sample`, emoji:held_out or tfds:NAME."""
    reference: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REFERENCE")]
    """emoji, emoji:held_out, emoji:all, tfds:NAME or tfds:NAME:SPLIT, a folder, or an .npz file with arr_0 or with
    the statistics mu and sigma (and mu_s, sigma_s) of OpenAI's evaluator."""
    metrics: str = "fid"
    """Comma-separated: fid, sfid, kid, is, pr (precision and recall, 3 neighbors), prdc (with density and coverage,
    5 neighbors), bpd (bits per dimension of the reference under a denoiser)."""
    count: int | None = None
    """Number of samples; for bpd, of reference images. Default: all images of a file; 50,000 from a checkpoint."""
    likelihood_steps: int = 64
    """Heun steps of the likelihood ODE for bpd; each evaluates the denoiser and its derivative twice."""
    output: Path | None = None
    """JSON file for all results and the evaluation settings. Default: not written."""
    save_reference: Path | None = None
    """.npz file for mu and sigma of the reference, as OpenAI's evaluator reads them. Default: not written."""


def main(prog: str, words: Sequence[str]) -> None:
    """Read the images, compute the metrics, and print each report in one line."""
    args = parse(Evaluate, prog, words)
    use_compilation_cache(args.compilation_cache)
    args.connect()
    for path in filter(None, (args.output, args.save_reference)):
        check_writable(path, folder=False)
    metrics = tuple(dict.fromkeys(word.strip().lower() for word in args.metrics.split(",")))
    unknown = [metric for metric in metrics if metric not in (*NEEDS, "bpd")]
    if unknown:
        raise InputError(f"There is no metric {unknown[0]!r}: choose from {', '.join(NEEDS)}, bpd.")
    images = holds_images(args.samples)
    fields = (*dataclasses.fields(Sampling), *dataclasses.fields(WhichWeights))
    given = [field.name.replace("_", "-") for field in fields if getattr(args, field.name)]
    if images and given:
        raise InputError(f"--{given[0]} applies to checkpoints, and {args.samples} holds images: omit it.")
    model = None
    if not images:
        model = dataclasses.replace(args.load(resolve(args.samples), args.precision), parallelism=args.parallelism)
    others = tuple(metric for metric in metrics if metric != "bpd")
    sampling = [field.name.replace("_", "-") for field in dataclasses.fields(Sampling) if getattr(args, field.name)]
    if sampling and not others:
        raise InputError(f"--{sampling[0]} applies to samples, and bpd does not sample: see --likelihood-steps.")
    if args.save_reference is not None and not {"fid", "sfid"} & set(others):
        raise InputError("--save-reference needs fid or sfid: add one of them to --metrics.")
    reports = [_compared(args, model, EvalConfig(others))] if others else []
    if "bpd" in metrics:
        reports.append(_bits(args, model))
    if args.output is not None and jax.process_index() == 0:
        with atomic_write(args.output) as beside:
            beside.write_text(to_json(reports), "utf-8")
    for report in reports:
        say(report.line)


def _compared(args: Evaluate, model: Model | None, config: EvalConfig) -> Report:
    devices: Any = {"parallelism": args.parallelism, "shared": jax.process_count() > 1, "batch_size": args.batch_size}
    extractor = dataclasses.replace(load_inception(args.inception), cache=args.cache, **devices)
    if model is None:
        samples = of_dataset(open_images(args.samples), args.samples, args.count)
    else:
        count = 50_000 if args.count is None else args.count  # as is customary for FID
        plan = args.plan(model)
        samples = of_model(model, plan, count, seed=args.seed, batch_size=args.batch_size, name=args.samples)
    reference = open_reference(args.reference, config.needs, samples.shape)
    sets = f"{samples.count:,} images of {samples.name} against {reference.name}"
    say(f"Evaluating {sets}: {extractor.name}, {described(args.parallelism)}.")
    report, known = evaluate(extractor, samples, reference, config)
    if args.save_reference is not None and jax.process_index() == 0:
        write_statistics(args.save_reference, known)
    return report


def _bits(args: Evaluate, model: Model | None) -> Report:
    if model is None:
        raise InputError(f"bpd needs a checkpoint, and {args.samples} holds images.")
    dataset = open_images(args.reference, model.config.network.image_shape)
    count = None if args.count is None else min(args.count, dataset.size)
    names, steps = (args.samples, args.reference), args.likelihood_steps
    options: Any = {"seed": args.seed, "batch_size": args.batch_size}
    return evaluate_bits(model, dataset, count, steps=steps, names=names, **options)

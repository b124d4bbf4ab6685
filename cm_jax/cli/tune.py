"""`tune`: search the levels of a consistency model, and keep them in its checkpoint."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from cm_jax.checkpoints import native
from cm_jax.checkpoints.resolve import resolve
from cm_jax.cli.running import progress, say, use_compilation_cache
from cm_jax.errors import InputError
from cm_jax.evaluation.feature_extractor import load_inception
from cm_jax.evaluation.image_sets import of_dataset, open_images
from cm_jax.evaluation.level_search import tune
from cm_jax.evaluation.references import default_cache
from cm_jax.loading import load


@dataclasses.dataclass(frozen=True)
class Tune:
    """Search the levels at which a consistency model's FID is lowest, and keep them in its checkpoint.

    `sample --steps N` then uses them.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A cm_jax checkpoint, or a run's folder (its newest one); `convert` makes one of a .pt file."""
    reference: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REFERENCE")]
    """Images, as `evaluate` takes them."""
    steps: int = 2
    """Number of steps; from three on, each level is found after the ones above it."""
    count: int = 10_000
    """Images drawn for each probe."""
    seed: int = 0
    """Of these images, the same for all probes."""
    inception: str = ""
    """Weights of Inception-V3. Default: what CM_JAX_INCEPTION names."""
    batch_size: int | None = None
    """Images drawn and seen at once over all devices."""
    reference_cache: str = ""
    """Folder in which statistics of references are kept by content, or "off". Default: in the user's cache folder."""
    compilation_cache: str = ""
    """Folder in which compiled programs are kept from run to run, or "off". Default: in the user's cache folder."""


def tune_command(arguments: Tune) -> None:
    """Search, say every probe, and write the result into config.json."""
    use_compilation_cache(arguments.compilation_cache)
    path = resolve(arguments.checkpoint)
    if not native.is_checkpoint(path):
        raise InputError(
            f"{arguments.checkpoint} has no place for tuned levels: make one of our checkpoints of it first, with "
            "cm-jax convert."
        )
    model = load(path)
    reference = of_dataset(open_images(arguments.reference, model.config.network.image_shape), arguments.reference)
    cache = Path(arguments.reference_cache) if arguments.reference_cache else default_cache()
    found = tune(
        load_inception(arguments.inception),
        model,
        reference,
        steps=arguments.steps,
        count=arguments.count,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        cache=None if arguments.reference_cache == "off" else cache,
        watch=progress,
        on_probe=lambda timesteps, score: say(f"{','.join(map(str, timesteps))}: FID {score:.4g}"),
    )
    others = [kept for kept in model.config.tuned_timesteps if len(kept) != len(found.timesteps)]
    tuned = tuple(sorted([*others, found.timesteps], key=len))
    native.rewrite_config(path, dataclasses.replace(model.config, tuned_timesteps=tuned))
    shown = ",".join(map(str, found.timesteps))
    say(
        f"Best of {len(found.probes)} probes: --timesteps {shown} with FID {found.score:.4g} [N = {arguments.count:,} "
        f"against {reference.count:,} of {arguments.reference}]; kept in {path / 'config.json'}."
    )

"""`tune`: search the noise levels of multistep sampling, and store them in the checkpoint."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from cm_jax.checkpoints import hub, native
from cm_jax.checkpoints.published import resolve
from cm_jax.cli.options import Statistics, WhichWeights
from cm_jax.cli.parsing import parse
from cm_jax.cli.running import say, use_compilation_cache
from cm_jax.errors import InputError
from cm_jax.evaluation.features import load_inception
from cm_jax.evaluation.image_sets import of_dataset, open_images
from cm_jax.evaluation.level_search import tune
from cm_jax.io.atomic import check_writable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune(WhichWeights, Statistics):
    """Search the noise levels at which multistep sampling has the lowest FID, and store them in the checkpoint.

    `sample --steps N` then uses them.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A native checkpoint, or a run folder (its latest checkpoint). `convert` makes one from other formats."""
    reference: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REFERENCE")]
    """Reference images, as for `evaluate`."""
    steps: int = 2
    """Number of sampling steps. With three or more, the levels are searched one after the other, from the highest."""
    count: int = 10_000
    """Images sampled for each candidate."""
    guidance: float | None = None
    """Guidance strength, for a model distilled with a range of them. Default: 1, no guidance."""


def main(prog: str, words: Sequence[str]) -> None:
    """Search, print every candidate, and write the result into config.json."""
    args = parse(Tune, prog, words)
    use_compilation_cache(args.compilation_cache)
    path = resolve(args.checkpoint)
    if not native.is_checkpoint(path) or hub.cached_id(path):
        advice = f"convert it to a native checkpoint first, with cm-jax convert {shlex.quote(args.checkpoint)} FOLDER."
        raise InputError(f"{args.checkpoint} cannot store tuned noise levels: {advice}")
    check_writable(path / "config.json", folder=False)
    model = args.load(path)
    reference = of_dataset(open_images(args.reference, model.config.network.image_shape), args.reference)
    extractor = dataclasses.replace(load_inception(args.inception), batch_size=args.batch_size, cache=args.cache)

    def on_probe(timesteps: Sequence[int], score: float) -> None:
        say(f"{','.join(map(str, timesteps))}: FID {score:.4g}")

    options: Any = {"steps": args.steps, "count": args.count, "seed": args.seed, "guidance": args.guidance}
    found = tune(extractor, model, reference, on_probe=on_probe, **options)
    best = f"Best of {len(found.probes)} candidates: --timesteps {','.join(map(str, found.timesteps))}"
    say(f"{best} with FID {found.score:.4g} [N = {args.count:,} against {reference.count:,} of {args.reference}].")
    if not native.is_checkpoint(path):
        raise InputError(f"The result was not stored: {path} was removed meanwhile.")
    stored = native.read_config(path)  # another search may have stored its result meanwhile
    others = [kept for kept in stored.tuned_timesteps if len(kept) != len(found.timesteps)]
    tuned = tuple(sorted([*others, found.timesteps], key=len))
    sigmas = tuple(kept for kept in stored.tuned_sigmas if len(kept) != len(found.timesteps))
    native.rewrite_config(path, dataclasses.replace(stored, tuned_timesteps=tuned, tuned_sigmas=sigmas))
    say(f"Stored it in {path / 'config.json'}.")

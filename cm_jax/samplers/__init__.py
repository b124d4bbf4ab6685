"""Samplers: from standard normal noise to images, along descending noise levels.

A sampler is a frozen dataclass called with a denoiser, noise levels and a source of noise. The call is pure JAX, so it
compiles into one program with the network.

`sample` samples inside your own jit, vmap or grad:

    plan = model.plan(steps=2)

    @jax.jit
    def images(model, key):
        keys = image_keys(key, jnp.arange(8))
        return sample(model.config.function, plan.sampler, model.params, plan.levels, keys, labels)
"""

from cm_jax.checkpoints.registry import registered
from cm_jax.errors import InputError, nearest, one_line
from cm_jax.samplers.base import NoiseLevelArgs, Sampler, choose_levels, scan_steps
from cm_jax.samplers.consistency import Consistency, Segments
from cm_jax.samplers.generation import image_keys, sample
from cm_jax.samplers.guidance import Guidance, GuidanceArgs, Guide, choose_guidance
from cm_jax.samplers.probability_flow import DPM, Ancestral, Churn, Euler, Heun, ProgressiveEuler
from cm_jax.samplers.score_sde import ScoreSDE, VESchedule, VPSchedule

SAMPLERS: dict[str, Sampler] = {
    "consistency": Consistency(),
    "heun": Heun(),
    "euler": Euler(),
    "dpm": DPM(),
    "ancestral": Ancestral(),
    "progdist": ProgressiveEuler(),
    "segments": Segments(),
    "vp": ScoreSDE(schedule=VPSchedule()),
    "ve": ScoreSDE(schedule=VESchedule()),
}
"""Samplers by their names on the command line, with default settings."""


def sampler_named(name: str) -> Sampler:
    """A sampler of SAMPLERS, or a registered class with default settings: MySampler or my-sampler.

    Raises InputError for any other name.
    """
    own = {kind.lower(): make for kind, make in registered(Sampler).items()}
    folded = name.lower().replace("-", "").replace("_", "") if isinstance(name, str) else None
    if folded in SAMPLERS:
        return SAMPLERS[folded]
    if folded in own:
        try:
            return own[folded]()
        except TypeError as error:
            raise InputError(f"{name} has settings without defaults: give an instance in Python.") from error
    names = [*SAMPLERS, *registered(Sampler)]
    raise InputError(f"Expected one of the samplers {', '.join(names)}; got {one_line(name)}.{nearest(name, names)}")

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

from cm_jax.samplers.base import NoiseLevelArgs, Sampler, choose_levels
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

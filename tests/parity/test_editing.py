"""Parity with the recorded edits of OpenAI's code, from the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.editing import Luma, PatchMean, edit
from cm_jax.editing.algorithm import edited_denoiser
from cm_jax.samplers import Consistency, choose_levels
from cm_jax.samplers.consistency import multistep_sample
from tests.support import DATA, adm_golden, nhwc

BOUND = 1e-5


@pytest.mark.parametrize(("name", "operator"), [("colorization", Luma()), ("superres", PatchMean(8))])
def test_recorded_edits(name, operator):
    with np.load(DATA / "openai" / f"edit_{name}.npz") as recorded:
        golden = dict(recorded)
    images, start, noise, given, out = (
        jnp.asarray(nhwc(golden[key])) for key in ("images", "start", "noise", "given", "out")
    )
    network, params, _ = adm_golden(str(golden["model"]).removeprefix("adm_"))
    denoiser = ConsistencyFunction(network, ConsistencyPreconditioning()).denoiser(
        params, jnp.asarray(golden["y"], jnp.int32)
    )
    levels = jnp.asarray(
        choose_levels(Consistency(), KarrasSchedule(), int(golden["steps"]), indices=golden["ts"].tolist()), jnp.float32
    )
    np.testing.assert_allclose(operator.project(images), given, atol=1e-6)

    @jax.jit
    def sample(images):
        return multistep_sample(
            edited_denoiser(denoiser, operator, images), start, levels, lambda index: noise[index - 1]
        )

    np.testing.assert_allclose(sample(images), out, atol=BOUND)
    np.testing.assert_allclose(sample(given), out, atol=BOUND)

    def noise_source(index):
        """OpenAI's code starts from noise only; the paper and cm_jax add the known part of the image."""
        return jnp.where(index == 0, (start - given) / levels[0], noise[index - 1])

    np.testing.assert_allclose(
        jax.jit(lambda: edit(denoiser, operator, images, levels, noise_source))(), out, atol=BOUND
    )

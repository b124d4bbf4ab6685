"""Programs of small networks, compiled for NVIDIA GPUs and TPUs by their own compilers, on a machine with neither."""

import importlib.util

import pytest

from benchmarks.compiled_programs import network_program, parallelism, step_program
from benchmarks.targets import TARGETS, compile_for, costs
from cm_jax.parallelism import OneDevice
from cm_jax.types import parameter_count
from tests.laws.test_other_platforms import ADM, ATTENTION, STEPS, with_network
from tests.toy import ToyNetwork

MISSING = [name for name in ("jax_cuda13_plugin", "libtpu") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install '.[aot]')")

TOY = ToyNetwork(classes=9)
GRADIENT = 4 * parameter_count(TOY.shapes())


@pytest.fixture(scope="module", params=["8xh100", "v5e:4x4"])
def target(request):
    """All tests of a target run after each other, and share what was traced."""
    found = TARGETS[request.param]
    with found.active():
        yield found


def compiled(target, program, arguments):
    """Costs of a program on one device."""
    return costs(compile_for(target, program, *arguments))


@pytest.mark.parametrize("name", STEPS)
def test_training_steps_compile(name, target):
    found = compiled(target, *step_program(with_network(STEPS[name], TOY), 2, OneDevice()))
    assert found.kernels
    assert found.bytes > 3 * GRADIENT  # parameters and two moments
    assert not found.collectives


def test_a_network_compiles_in_half_precision(target):
    found = compiled(target, *network_program(ADM, "sample-2", 2))
    assert any(ATTENTION in entry.kind for entry in found.traffic) == (target.platform == "cuda")
    assert found.operations > 2 * 2 * 8 * 8 * 4 * 9 * 32 * 32  # two steps, two images, four convolutions


def test_the_gradient_of_a_network_compiles(target):
    found = compiled(target, *network_program(ADM, "gradient", 2))
    fused = any(f"{ATTENTION}Backward" in entry.kind for entry in found.traffic)
    assert fused == (target.platform == "cuda")


@pytest.mark.parametrize("name", ["pmap", "mesh", "sharded", "replicas"])
def test_collectives(name, target):
    """Data parallelism sums the gradient once; sharding also gathers student and target, and sums no more."""
    across = parallelism(name, target.count)
    program, arguments = step_program(with_network(STEPS["emoji32-cd"], TOY), 2, across)
    found = costs(program.lower(*arguments).compile()).collectives
    if name in ("pmap", "mesh"):
        assert set(found) == {"all-reduce"}
        number, size = found["all-reduce"]
        assert number == 1
        assert GRADIENT <= size < GRADIENT + 100  # and a few scalars to log
        return
    assert set(found) <= {"all-reduce", "all-gather", "reduce-scatter"}
    shards = 8 if name == "replicas" else target.count
    scattered, reduced = (found.get(kind, (0, 0))[1] for kind in ("reduce-scatter", "all-reduce"))
    between_replicas = GRADIENT / shards if target.count > shards else 0
    assert GRADIENT <= shards * scattered + reduced < GRADIENT + between_replicas + 1000
    assert 0 < found["all-gather"][1] <= 2 * GRADIENT

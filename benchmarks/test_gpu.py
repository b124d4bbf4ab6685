"""All parts of `benchmarks.gpu` run with tiny networks on a CPU; operation counts, profiles and goals are correct."""

import argparse
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.common import ROOT
from benchmarks.gpu import COMPILED, EAGER, TIME_SHARES, goals, run_parts
from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_task import TINY
from benchmarks.products import products
from benchmarks.profiles import Ceilings, costs, table
from benchmarks.program import Program
from cm_jax import kernels

ABSENT = ("tyro", "grain", "tensorflow_datasets", "diffusers")
"""Packages that `benchmarks.gpu` must not need."""


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_operations_of_a_convolution_match_xla(stride: int, padding: int) -> None:
    def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        around = [(padding, padding)] * 2
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), around, dimension_numbers=numbers)

    x, kernel = jnp.ones((2, 8, 6, 5)), jnp.ones((3, 3, 5, 7))
    y = convolved(x, kernel)

    def to_image(y: jax.Array) -> Any:
        return jax.linear_transpose(lambda x: convolved(x, kernel), x)(y)

    def to_kernel(y: jax.Array) -> Any:
        return jax.linear_transpose(lambda kernel: convolved(x, kernel), kernel)(y)

    for function, arguments in ((convolved, (x, kernel)), (to_image, (y,)), (to_kernel, (y,))):
        counted: Any = jax.jit(function).lower(*arguments).cost_analysis()
        assert sum(products(function, *arguments).values()) == counted["flops"]


def test_products_are_most_operations_of_a_network() -> None:
    shapes = TINY.shapes()
    x, times = jax.ShapeDtypeStruct((2, *TINY.image_shape), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    arguments = shapes, x, times, jax.ShapeDtypeStruct((2,), jnp.int32)
    with kernels.off():  # XLA does not count operations of custom kernels
        counted: Any = jax.jit(TINY.predict).lower(*arguments).cost_analysis()
    assert 0.9 < sum(products(TINY.predict, *arguments).values()) / counted["flops"] < 1


def test_products_in_loops_count_once_per_iteration() -> None:
    def powers(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jnp.dot(c, x), None), x, length=5)[0]

    assert products(powers, jnp.ones((4, 4), jnp.bfloat16)) == {"bfloat16": 5 * 2 * 4**3}


GPU_PROGRAM = """\
HloModule jit_f, is_scheduled=true

%fused_work (p.0: bf16[8,16,16,64], p.1: f32[8,64]) -> bf16[8,16,16,64] {
  %p.0 = bf16[8,16,16,64]{3,2,1,0} parameter(0)
  %p.1 = f32[8,64]{1,0} parameter(1)
  ROOT %convert.1 = f32[8,16,16,64]{3,2,1,0} convert(%p.0)
}

ENTRY %main (x: bf16[8,16,16,32], k: bf16[3,3,32,64], s: f32[8,64]) -> bf16[8,16,16,64] {
  %x = bf16[8,16,16,32]{3,2,1,0} parameter(0)
  %k = bf16[3,3,32,64]{3,2,1,0} parameter(1)
  %s = f32[8,64]{1,0} parameter(2)
  %conv.2 = (bf16[8,16,16,64]{3,2,1,0}, u8[4096]{0}) custom-call(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  %y = bf16[8,16,16,64]{3,2,1,0} get-tuple-element(%conv.2), index=0
  %grad.1 = (bf16[3,3,32,64]{3,2,1,0}, u8[512]{0}) custom-call(%x, %y), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %back.1 = (bf16[8,16,16,32]{3,2,1,0}, u8[512]{0}) custom-call(%y, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardInput"
  %gemm.3 = (f32[64,64]{1,0}, s8[64]{0}) custom-call(%s, %s), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %loop_convert_fusion.7 = bf16[8,16,16,64]{3,2,1,0} fusion(%y, %s), kind=kLoop, calls=%fused_work
}
"""  # noqa: E501
CONVOLUTION = 2 * 8 * 16 * 16 * 64 * 9 * 32


def test_gpu_program_is_parsed() -> None:
    program = Program(GPU_PROGRAM)
    for name, label in (("conv.2", "convForward"), ("grad.1", "convBackwardFilter"), ("back.1", "convBackwardInput")):
        work = program.work(name)
        assert work is not None
        assert label in work.label
        assert work.operations == CONVOLUTION
        assert work.bytes == 2 * (8 * 16 * 16 * (32 + 64) + 9 * 32 * 64)
    product, fusion = program.work("gemm.3"), program.work("loop_convert_fusion.7")
    assert product is not None
    assert fusion is not None
    assert product.operations == 2 * 64 * 64 * 8
    assert (fusion.bytes, fusion.operations) == (2 * 2 * 8 * 16 * 16 * 64 + 4 * 8 * 64, 0)
    assert program.counts()["__cublas$gemm"] == 1
    assert program.converted() == {"bf16 -> f32": 4 * 8 * 16 * 16 * 64}


def test_table_of_a_gpu_profile(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
        {"ph": "M", "pid": 1, "tid": 5, "name": "thread_name", "args": {"name": "Stream #13(Compute)"}},
        {"ph": "M", "pid": 1, "tid": 6, "name": "thread_name", "args": {"name": "XLA Ops"}},
        {"ph": "X", "pid": 2, "tid": 1, "ts": 0, "dur": 9000.0, "name": "jit_f", "args": {"hlo_op": "conv.2"}},
        {"ph": "X", "pid": 1, "tid": 6, "ts": 0, "dur": 9000.0, "name": "conv.2", "args": {"hlo_op": "conv.2"}},
    ]
    for dur, name, op in ((30.0, "sm90_xmma", "conv.2"), (10.0, "loop_convert_fusion", "loop_convert_fusion.7")):
        one = {"ph": "X", "pid": 1, "tid": 5, "ts": 0, "dur": dur, "name": name, "args": {"hlo_op": op}}
        events += [one, one]  # two passes
    events.append({"ph": "X", "pid": 1, "tid": 5, "ts": 0, "dur": 4.0, "name": "memcpy<int>", "args": {}})
    (tmp_path / "plugins").mkdir()
    with gzip.open(tmp_path / "plugins" / "machine.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = costs(tmp_path, Program(GPU_PROGRAM), passes=2)
    assert [each.times for each in found] == [1, 1, 0.5]
    assert [round(1e6 * each.seconds, 3) for each in found] == [30, 10, 2]
    assert [each.operations for each in found] == [CONVOLUTION, 0, None]
    _, _, convolution, fusion, copy, whole = table(found, Ceilings(CONVOLUTION / 15e-6, 1e15))
    assert convolution.endswith("| 1.0 | 0.030 | 0.71 | 0.00 | 0.50 |")
    assert fusion.endswith("| 1.0 | 0.010 | 0.24 | 0.00 |  |")
    assert copy == "| `memcpy` | 0.5 | 0.002 | 0.05 |  |  |"
    assert "0.042 ms" in whole


def test_goals() -> None:
    assert set(TIME_SHARES) == set(PARTS)
    assert {goal.outcome for goal in goals({})} == {"not measured"}
    found: dict[str, Any] = {
        "sampling": {
            "batch": 256, "images/s": 1700.0, "share": 0.44, "latency to eager": 0.4, "peak": 2e9,
            f"to {EAGER}": 0.3, f"to {COMPILED}": 0.8, f"peak of {EAGER}": 3e9, f"peak of {COMPILED}": 1e9,
        },
        "cd": {"batch": 32, "images/s": 260.0, f"to {EAGER}": 0.6, "peak": float("nan"), f"peak of {EAGER}": 1.0},
        "ect": {"images/s": 2100.0},
        "sct": {"images/s": 2000.0},
        "start": {"bundled, empty": 9.0, "bundled, warm": 4.0},
    }  # fmt: skip
    outcomes = [goal.outcome for goal in goals(found)]
    assert outcomes == [
        "met", "missed", "missed", "met", "met", "not measured", "not measured", "met", "met", "met", "missed",
        "not measured", "not measured", "met", "not measured",
    ]  # fmt: skip
    to_pytorch = next(goal for goal in goals(found) if goal.name == "ImageNet-64, one step, time / PyTorch")
    assert to_pytorch.line().endswith("time / PyTorch | 0.75 or less | 0.8 | missed | eager 0.30, compiled 0.80 |")
    assert "compiled not measured" in [*goals(found)][5].note


def test_part_is_ended_at_its_time_limit(tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    args = argparse.Namespace(small=True, folder=None)
    assert run_parts(["cd"], 0.5, args, tmp_path, found) == "ended after 0 s"
    assert found == {"cd": {}}


def test_all_parts_on_a_cpu(tmp_path: Path) -> None:
    """Runs without the packages in ABSENT: their import fails in every process."""
    for name in ABSENT:
        (tmp_path / "absent" / name).mkdir(parents=True)
        (tmp_path / "absent" / name / "__init__.py").write_text(f'raise ImportError("{name} is absent")\n')
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'absent'}{os.pathsep}{ROOT}", "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--small",
        "--seconds",
        "3000",
        "--folder",
        str(tmp_path / "kept"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "kept" / "results.json").read_text())
    assert report["failures"] == dict.fromkeys(TIME_SHARES, ""), done.stdout + done.stderr
    unmeasured = [line for line in done.stdout.splitlines() if "not measured" in line]
    assert all("Peak memory" in line or "ImageNet-64 network, warm cache" in line for line in unmeasured)
    assert len(unmeasured) == 4
    assert "No profile" not in done.stdout
    for name in ("sampling", "cd"):
        assert f"Largest costs of `{name}`" in done.stdout
        profile = report["found"][name][f"{name}: profile"]
        assert any(each["operations"] for each in profile)
        with gzip.open(tmp_path / "kept" / f"{name}.hlo.txt.gz", "rt") as file:
            assert file.read().startswith("HloModule")
    rivals = [line for line in done.stdout.splitlines() if f"| {COMPILED} |" in line]
    assert len(rivals) == 3
    assert report["found"]["sampling"]["share"] > 0

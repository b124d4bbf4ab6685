"""Bytes, operations and memory of a compiled TPU program, parsed from its text; and jobs of `benchmarks.compiled`."""

import json
from pathlib import Path

import pytest

from benchmarks import compiled
from benchmarks.compiled_programs import PARALLEL, main_programs, program_names
from benchmarks.hlo import collectives
from benchmarks.program import Program
from benchmarks.targets import TARGETS

TPU_PROGRAM = """\
HloModule jit_f, is_scheduled=true, input_output_alias={ {1}: (2, {}, may-alias) }, entry_computation_layout={()->()}

%fused (p.0: bf16[48,2,64,16], p.1: bf16[48,2,64,16]) -> f32[48,2,64,64] {
  %p.0 = bf16[8,6,64,16]{3,2,1,0} parameter(0)
  %p.1 = bf16[8,6,64,16]{3,2,1,0} parameter(1)
  ROOT %convolution.1 = f32[8,6,64,64]{3,2,1,0} convolution(%p.0, %p.1), window={size=8x6 stride=7x5 lhs_dilate=8x6}, dim_labels=01bf_01oi->01bf
}

%body (b: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %b = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %g = f32[8,128]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %sum.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%g), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %i = s32[] get-tuple-element(%b), index=0
  ROOT %t = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%i, %sum.1)
}

ENTRY %main (x: bf16[8,6,64,16], w: f32[40,100], s: f32[32,128], r: f32[8,128]) -> (f32[8,6,64,64], f32[32,128]) {
  %x = bf16[8,6,64,16]{3,2,1,0} parameter(0)
  %w = f32[40,100]{1,0:T(8,128)} parameter(1)
  %s = f32[32,128]{1,0:T(8,128)} parameter(2)
  %r = f32[8,128]{1,0:T(8,128)} parameter(3)
  %part = ((f32[40,100]{1,0:T(8,128)}), f32[8,100]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:8], [0:100]}
  %part.done = f32[8,100]{1,0:T(8,128)S(1)} slice-done(%part)
  %scores = f32[8,6,64,64]{3,2,1,0} fusion(%x, %x), kind=kOutput, calls=%fused
  %zero = s32[] constant(0)
  %in = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%zero, %r)
  %loop = (s32[], f32[8,128]{1,0:T(8,128)}) while(%in), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %new = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %state = f32[32,128]{1,0:T(8,128)} pad(%new, %zero), padding=0_24x0_0
  ROOT %results = (f32[8,6,64,64]{3,2,1,0}, f32[32,128]{1,0:T(8,128)}) tuple(%scores, %state)
}
"""  # noqa: E501
TILE, SCORES = 4 * 8 * 128, 4 * 8 * 6 * 64 * 64


def test_tpu_program_is_parsed() -> None:
    program = Program(TPU_PROGRAM)
    found = {row.kind: row for row in program.traffic()}
    assert found["slice-start"].bytes == TILE  # padded, read once, and written to VMEM, which does not count
    scores = found["fusion with a product"]
    assert scores.operations == 2 * 48 * 64 * 64 * 16  # one product for each of 48 heads
    assert scores.bytes == SCORES + 2 * 48 * 64 * 16
    assert (found["all-reduce"].number, found["all-reduce"].bytes) == (5, 5 * 2 * TILE)
    assert found["pad"].bytes == (1 + 4) * TILE + 4
    assert collectives(TPU_PROGRAM) == [("all-reduce", TILE)]


def test_memory_by_the_schedule() -> None:
    program = Program(TPU_PROGRAM)
    assert program.arguments() == 2 * 48 * 64 * 16 + 4 * 40 * 128 + 5 * TILE
    assert program.peak() == SCORES + TILE  # the loop's result; the new state is in the place of an argument
    assert Program(TPU_PROGRAM.replace("input_output_alias", "other")).peak() == SCORES + 4 * TILE


@pytest.mark.parametrize("name", TARGETS)
def test_main_programs(name: str) -> None:
    jobs = list(main_programs(name))
    assert len(set(jobs)) == len(jobs)
    for job in jobs:
        assert job.program in program_names()
        assert job.parallel in PARALLEL


def test_unknown_programs_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["compiled", "--programs", "imagenet64-forward,imagenet64"])
    with pytest.raises(SystemExit, match="2"):
        compiled.main()
    assert "unknown: imagenet64; choose from imagenet64-forward, " in capsys.readouterr().err


def test_results_are_read_back(tmp_path: Path) -> None:
    file, job = tmp_path / "results", {"program": "imagenet64-cd"}
    lines = [{"job": job, "versions": {"jax": version}, "kernels": n} for n, version in enumerate(("1", "2", "2", "3"))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compiled.earlier(file, {"jax": "2"})[json.dumps(job)]["kernels"] == 2
    assert not compiled.earlier(tmp_path / "none", {"jax": "2"})

"""The report on CUDA kernels: figures are read off what the compiler says, and nothing that must not be passes."""

from __future__ import annotations

import pytest

from bench import cuda_report
from bench.cuda_report import Instruction, instructions, loops, products, resources, row

SAID = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
C7510 = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the wgmma pipeline crossing function boundary in the function '_Z1aPf'"
)
SASS = """
		Function : _Z1aPf
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/                   UTMALDG.5D [UR8], [UR4] ;                  /* 0x1 */
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   STG.E [R2], R3 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
        /*0080*/                   NOP;
		Function : _Z1bPf
        /*0000*/                   STL [R1], R3 ;
        /*0010*/                   EXIT ;
"""


def rows(said: str = SAID):
    code = instructions(SASS)
    return [row(name, code[name], used, said, "x.cu", 90) for name, used in resources(said).items()]


def test_figures_are_those_of_the_compiler():
    a, b = rows()
    assert [a[k] for k in ("registers", "stack", "spills", "shared", "barriers")] == [168, 0, 0, 1024, 3]
    assert [a[k] for k in ("HGMMA", "HMMA", "TMA", "instructions")] == [1, 0, 1, 8]
    assert (a["tile instructions"], a["tile products"]) == (5, 1), "from 0x10 to the branch back at 0x50"
    assert (a["inner instructions"], a["inner products"]) == (2, 1)
    assert a["fails"] == []
    assert b["tile instructions"] is None
    assert b["fails"] == ["1 spill instructions", "16 bytes of stack"]


@pytest.mark.parametrize("line", [C7510, C7510.replace("C7510", "C7514"), "warning: wgmma instructions are serialized"])
def test_serialised_products_are_a_failure_of_the_kernel_that_is_named(line):
    a, b = rows(SAID + line)
    assert a["fails"] == [line]
    assert (line in b["fails"]) == ("function '" not in line), "one that names no kernel is about all of the file"


def test_a_kernel_for_wgmma_has_some():
    code = instructions(SASS)
    found = [row(name, code[name], used, SAID, "wgmma_x.cu", 90) for name, used in resources(SAID).items()]
    assert found[0]["fails"] == []
    assert found[1]["fails"][-1] == "no HGMMA"


def test_loops_without_products_are_none_of_a_tile():
    code = [
        Instruction(0, "NOP"),
        Instruction(16, "BRA 0x0"),
        Instruction(32, "HMMA.16816 R0"),
        Instruction(48, "EXIT"),
    ]
    assert loops(code) == [code]
    assert products(code) == 1


SPILLS = """
__global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float a[96];
  for (int i = 0; i < 96; i++) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 96; i++) for (int j = 0; j < 96; j++) a[j] = a[j] * a[i] + a[(j + 1) % 96];
  for (int i = 0; i < 96; i++) x[i * 1024 + threadIdx.x] = a[i];
}
"""


@pytest.mark.skipif(cuda_report.missing() != "", reason="needs nvcc")
def test_a_kernel_that_spills_fails(tmp_path):
    file = tmp_path / "spills.cu"
    file.write_text(SPILLS)
    said: list[str] = []
    (found,) = cuda_report.report([80], said.append, [file])
    assert found["kernel"] == "spills"
    assert found["registers"] == 32
    assert found["spills"] > 0
    assert "spill instructions" in said[-1]
    file.write_text("nonsense")
    with pytest.raises(RuntimeError, match=r"nvcc refuses spills.cu for sm_80: "):
        cuda_report.report([80], said.append, [file])


def test_without_the_compiler_it_says_so(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(cuda_report.shutil, "which", lambda tool: None)
    assert cuda_report.report([90], said.append) == []
    assert said == ["no nvcc: the CUDA kernels are left out"]

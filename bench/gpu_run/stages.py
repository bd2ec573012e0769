"""The stages of a run: what each does, how long it is expected to take, and when it is ended.

Expected seconds are for an H100 with 16 CPU cores. They are added up from compile times measured on a CPU (below) and
from the windows that the timings are given; none was measured on a GPU. What a stage does is in ``stage.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RESULTS = "results.jsonl"
NO_DEVICE = 77  # exit status of the stage device without one
# Processor seconds of ``python -m bench.gpu_run.warm`` (AMD EPYC, torch 2.11, Triton 3.6) per network, launchers
# included, and seconds in which one process records its launches; "tiny" is the step of the proofs, in all its methods
COMPILING = {"wrn28_4": 48.0, "resnet32": 26.0, "tiny": 20.0, "narrow": 31.0}
RECORDING = {"wrn28_4": 7.0, "resnet32": 9.6, "tiny": 1.8, "narrow": 2.3}
WORKERS = 14
IMPORT = 5.0  # of torch and the package, with the CUDA context: once a stage


def compiling(*networks: str) -> float:
    return IMPORT + sum(RECORDING[name] + COMPILING[name] / WORKERS for name in networks)


@dataclass(frozen=True)
class Stage:
    """One process. ``limit`` seconds after its start it is ended.

    ``background`` goes on while others run; ``after`` names such stages which have to have ended before this one
    starts, so that nothing disturbs a timing. ``needs`` names stages without whose success this one is left out.
    ``restarts``: it knows from the results what it has done, and is started so often again after it died; ``stall``
    seconds without a record count as dead. ``when`` names the finding (``findings``) that calls for it. ``module`` is a
    command of its own, run with ``--json``.
    """

    name: str
    call: str
    does: str
    limit: int
    expected: float
    background: bool = False
    after: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    restarts: int = 0
    stall: int = 0
    when: str = ""
    module: tuple[str, ...] = ()


# A process of a proof may need half a minute for its first record: PyTorch and cuDNN from a disk that is cold
PROOF: dict[str, Any] = {"restarts": 5, "stall": 45}
QUIET = ("launches-odd", "compile-peer")  # before anything is timed; what the first finds, the timed step obeys
STAGES = (
    Stage("device", "AB", "device, driver, clocks, versions; a copy and a matrix product: the card's roof", 90, 12),
    Stage("extension", "AB", "loads the extension as carried; builds it where that fails", 90, 6),
    Stage("warm", "A", "compiles the kernels of WRN-28-4 and of the tiny steps, many at once", 75,
          compiling("wrn28_4", "tiny", "narrow")),
    Stage("driver", "A", "the wgmma kernels without PyTorch, against a CPU: descriptors, layout, every kernel", 60, 20),
    Stage("prove", "A", "the wgmma kernels against references, as before every run", 60, 20),
    Stage("compile-peer", "A", "torch.compile of the peer, into its cache", 150, 90, background=True),
    Stage("smoke", "A", "one tiny step, launched, then captured", 60, 12),
    Stage("launches-odd", "A", "launches of odd sizes against float64", 75, 30, background=True, **PROOF),
    Stage("launches", "A", "every launch of WRN-28-4 against float64", 75, 30, **PROOF),
    Stage("wgmma", "A", "every launch of WRN-28-4 that wgmma covers against float64", 60, 18, **PROOF),
    Stage("step", "A", "tiny steps against float64; replayed is launched, and twice is the same", 60, 28,
          after=("launches-odd",)),
    Stage("walk", "A", "the step beside float64, launch by launch: the first buffer that parts", 60, 0,
          when="step wrong"),
    Stage("captures", "A", "which captured launch differs, and what cures it", 60, 0, when="capture differs"),
    Stage("first", "A", "the fused engine alone: first numbers", 40, 15, after=("launches-odd",)),
    Stage("measure", "A", "what the design rests on: products, L2, cuDNN, BatchNorm, nodes of a graph", 60, 28,
          after=QUIET, restarts=4, stall=25),
    Stage("table", "A", "fused, with Triton's convolutions, torch.compile: gated, interleaved", 110, 62, after=QUIET),
    Stage("kernels", "A", "every launch at full size timed: Triton, CUDA, wgmma, cuDNN", 110, 90, after=QUIET),
    Stage("tuned", "A", "the step by the table of the fastest, beside the present one", 70, 35, after=QUIET,
          needs=("kernels",)),
    Stage("warm-other", "B", "compiles the kernels of both networks, or finds them carried", 75,
          compiling("wrn28_4", "resnet32", "tiny", "narrow")),
    Stage("csrc", "B", "the extension's ops and the CUDA convolution against their references", 75, 30,
          background=True),
    Stage("sanitize", "B", "every CUDA launcher under compute-sanitizer's four tools", 75, 35, background=True),
    Stage("warps-4", "B", "every launch at 4 warps against float64", 75, 35, background=True, **PROOF),
    Stage("warps-8", "B", "every launch at 8 warps against float64", 75, 35, **PROOF),
    Stage("other-first", "B", "the fused engine alone on ResNet-32", 40, 15, after=("csrc", "sanitize", "warps-4")),
    Stage("other", "B", "ResNet-32 beside its peers, torch.compile last", 130, 95),
    Stage("small", "B", "WRN-28-4 at batch 128, launched from Python, the captured peer", 60, 34),
    Stage("tiers", "B", "mobilenet_v2 at 32x32: planned, captured, eager", 60, 30),
    Stage("counters", "B", "hardware counters of the slowest launches", 60, 25),
    Stage("tests", "long", "the tests that need a GPU", 580, 480),
    Stage("methods", "long", "KD, LatentBE, teachers in training", 560, 420, module=(
        "throughput", "--methods", "kd", "latentbe", "teach", "--batches", "512", "--contenders", "fused", "reference",
        "eager", "captured", "--minutes", "7")),
    Stage("search", "long", "torch.compile with its search among kernels, JAX", 3000, 1800, module=(
        "throughput", "--batches", "512", "--contenders", "fused", "max-autotune", "compiled-own", "jax",
        "--minutes", "40")),
    Stage("tiers-all", "long", "mobilenet_v2, densenet121 at 32x32 and 64x64: planned, captured, eager, torch.compile",
          1300, 900, module=(
        "throughput", "--networks", "mobilenet_v2-32", "mobilenet_v2-64", "densenet121-32", "densenet121-64",
        "--batches", "128", "--members", "2", "--contenders", "fused", "reference-captured", "reference", "compiled",
        "--minutes", "20")),
    Stage("loader", "long", "loaders", 300, 120, module=("loader",)),
    Stage("scaling", "long", "time against K, M, batch, depth, width", 560, 300, module=("scaling", "--rounds", "5")),
    Stage("startup", "long", "import, build, first step", 300, 120, module=("startup", "--rounds", "3")),
    Stage("pack", "AB", "caches and extension, to be carried in again", 20, 6),
)  # fmt: skip
# What a rehearsal can plant: in one launch or capture (``faults.py``), and FAULT=STAGE for a whole stage
FAULTS = ("launch", "launch-dies", "launch-hangs", "step", "captured", "uncapturable")
FAULTS_OF_STAGES = ("hang", "kill", "raise", "memory")
WITH_PEERS = ("table", "other", "small")  # where a contender can be out of memory
CALLS = {"A": 420, "B": 300, "long": 0}  # seconds, 0 for as long as it takes


def of_call(call: str) -> tuple[Stage, ...]:
    return tuple(stage for stage in STAGES if stage.call == call or (len(call) == 1 and call in stage.call))


def stated(stages: Sequence[Stage]) -> float:
    """Expected seconds of these stages, one after the other but for those in the background, which are waited for."""
    now, ends = 0.0, 0.0
    ending: dict[str, float] = {}
    for stage in stages:
        if stage.background:
            ending[stage.name] = now + stage.expected
        else:
            now = max([now, *(ending.get(name, 0.0) for name in stage.after)]) + stage.expected
        ends = max([now, *ending.values()])
    return ends


def words(call: str) -> str:
    """A call's stages with their expected seconds, as docs/benchmarks.md has them."""
    always = [stage for stage in of_call(call) if not stage.when]
    named = ", ".join(f"{s.name} {s.expected:.0f}{' (meanwhile)' if s.background else ''}" for s in always)
    return f"{call}, {stated(always):.0f} of {CALLS[call]}: {named}."

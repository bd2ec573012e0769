"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory, tensor-core instructions.

    python -m bench.kernel_report --arch 80 90 100 --json FILE [--networks wrn28_4 resnet32] [--batch 512] [--only cuda]

The four passes of a training step are run over each network with launches recorded instead of done; each distinct
kernel is then compiled for the architecture and its machine code read. A kernel's programs are those of its largest
launch; waves is how often they fill the device. The extension's CUDA kernels follow (``bench.cuda_report``).
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import cuda_report, depthwise, elementwise
from fastensdistill.data.augment import Augment, augment_images, draw, make_tables
from fastensdistill.data.mixing import Mixing
from fastensdistill.engine.joint import run_together
from fastensdistill.engine.packed import PackedWeights
from fastensdistill.engine.part_run import PartRun
from fastensdistill.engine.passes import run_part
from fastensdistill.kernels.launch import KernelLaunch, record_launches
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.models import create_model
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.network.join import join, running
from fastensdistill.network.launch import INPUT, grad
from fastensdistill.network.plan import plan_step
from fastensdistill.network.trace import trace

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # A100, H100 SXM, B200
# compute capability: shared memory of one block and of one multiprocessor, in bytes (CUDA programming guide)
SHARED_LIMIT = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024), 100: (227 * 1024, 228 * 1024)}
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


# name → image size, classes, images of a batch; "sample" is a small PreResNet with every kind of launch, for tests,
# "elementwise" the activations, gates and LayerNorms of other people's networks, by themselves, "depthwise" their
# depthwise convolutions
NETWORKS = {
    "wrn28_4": (32, 100, 128),
    "wrn28_10": (32, 100, 128),
    "resnet32": (32, 100, 128),
    "resnet18": (224, 1000, 16),
    "sample": (32, 100, 128),
    "elementwise": (0, 0, 16),
    "depthwise": (0, 0, 16),
}


# Each kind of change on its own, and all of them
AUGMENTATIONS = (
    Augment(), Augment(cutout=8, erasing=0.25), Augment(resized_crop=(0.08, 1.0)), Augment(trivial_augment=True),
    Augment(resized_crop=(0.08, 1.0), trivial_augment=True, cutout=8, erasing=0.25),
)  # fmt: skip


def record(name: str, groups: int = 4, batch: int | None = None) -> dict[str, KernelLaunch]:
    """The kernels of one training step with the paper's perturbation, M = K = ``groups``: key → its largest launch.

    The plan is run as the engine runs it, on tensors that are never touched. Tiles are those of the arch assumed.
    Without ``batch`` the network's own batch size.
    """
    size, classes, usual = NETWORKS[name]
    batch = batch or usual
    if name in ("elementwise", "depthwise"):
        cases = elementwise.cases if name == "elementwise" else depthwise.cases
        with record_launches() as launches:
            for case in cases(torch.device("cpu"), torch.bfloat16, groups, batch):
                case.run()
        return {key(launch): _without_values(launch) for launch in sorted(launches, key=programs)}
    sample = name == "sample"
    module = PreResNet(classes, blocks=(1, 1), widen=4) if sample else create_model(name, num_classes=classes)
    network = trace(module, (3, size, size))
    left: dict[bool, tuple[PackedWeights, dict[str, Any]]] = {}
    with record_launches() as launches:
        for plan in plan_step(network, network, groups, groups, batch).values():
            for part in plan.parts:
                count = len(part.groups)
                if part.launches[0].op != "conv":  # backward: with what the forward pass left
                    weights, buffers = left.pop(part.training)
                    buffers[grad(network.output)] = torch.empty(count, batch, classes)
                else:
                    weights = PackedWeights(part, count, torch.bfloat16, "cpu")
                    buffers = {INPUT: torch.empty(1, batch, size, size, 3)}
                    left[part.training] = weights, buffers
                run_part(PartRun(part, weights, torch.arange(count, dtype=torch.int32), buffers))
            for parts in running(plan.parts):
                if len(parts) == 2:  # with joint launches, too
                    index = torch.arange(groups, dtype=torch.int32)
                    one, other = (PartRun(p, left[p.training][0], index, dict(left[p.training][1])) for p in parts)
                    run_together(join(*parts), one, other)
        images, index = torch.empty(64, 3, size, size, dtype=torch.uint8), torch.empty(batch, dtype=torch.int64)
        images = images.contiguous(memory_format=torch.channels_last)
        for augment in AUGMENTATIONS:
            draws = draw(batch, augment, torch.Generator())
            augment_images(images, index, draws, augment, make_tables(augment, (size, size), "cpu"))
        mixing = Mixing(0.2, 1.0, classes, torch.device("cpu"), torch.float32)
        mixing(
            torch.empty(batch, 3, size, size),
            torch.zeros(batch, dtype=torch.int64),
            mixing.draw(batch, torch.Generator()),
        )
    return {key(launch): _without_values(launch) for launch in sorted(launches, key=programs)}


def programs(launch: KernelLaunch) -> int:
    return math.prod(launch.grid)


def _without_values(launch: KernelLaunch) -> KernelLaunch:
    """The launch with empty tensors in the place of its own, which would keep a network's memory."""
    arguments = {k: v.new_empty(0) if isinstance(v, Tensor) else v for k, v in launch.arguments.items()}
    return launch._replace(arguments=arguments)


def _signature(launch: KernelLaunch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Argument types, constants and alignment as Triton's own launcher would specialise them."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        aligned, specialise = False, not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name], aligned = POINTERS[value.dtype], True
        elif parameter.is_constexpr or value is None or (value == 1 and isinstance(value, int) and specialise):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name], aligned = "i64" if abs(value) >= 2**31 else "i32", specialise and value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def key(launch: KernelLaunch) -> str:
    """What makes a compiled kernel another: equal keys run the same machine code."""
    return repr((launch.kernel.__name__, _signature(launch), launch.num_warps, launch.num_stages, launch.maxnreg))


def describe(launch: KernelLaunch) -> str:
    """The launch in a few words: shape, then what is fused."""
    a = launch.arguments
    words = []
    if "KERNEL" in a:
        shape = f"{a['KERNEL']}x{a['KERNEL']} s{a['STRIDE']} {a['C']}"
        words.append(f"{shape}→{a['CO']} @{a['H']}" if "CO" in a else f"{shape} @{a['H']}")
    elif "KERNEL_H" in a:
        words.append(f"{a['KERNEL_H']}x{a['KERNEL_W']} s{a['STRIDE_H']} {a['C']} channels @{a['H']}")
    elif "C" in a:
        words.append(f"{a['C']} channels")
    if "N_CROPS" in a:  # of the images
        words += [word for word, on in (("resized", a["N_CROPS"]), ("TrivialAugment", a["p_rows"] is not None),
                                        ("erased", a.get("CUTOUT") or a.get("N_ERASED"))) if on]  # fmt: skip
    words += [a["KIND"]] if "KIND" in a else []
    fused = ("p_in_scale", "p_bias", "p_residual", "p_mask", "p_scale", "p_next_scale", "p_center", "p_mean")
    for side, before in (("", ""), ("_e", "evaluation:"), ("_t", "training:")):  # of a joint launch two
        found = [name[2:] for name in fused if isinstance(a.get(name + side), Tensor)]
        words += [before, *found] if before and f"p_z{side}" in a else found
    return " ".join(words)


def occupancy(arch: int, registers: int, shared: int, warps: int) -> int:
    """Programs that fit one multiprocessor: 65,536 registers, its shared memory (1 KB reserved each), 64 warps."""
    per_warp = -(-max(registers, 16) * 32 // 256) * 256
    by_shared = SHARED_LIMIT[arch][1] // (shared + 1024)
    return min(65536 // (per_warp * warps), by_shared, 64 // warps, 32)


def compile_launch(launch: KernelLaunch, arch: int) -> dict[str, Any]:
    """One row of the report."""
    signature, constants, attributes = _signature(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": launch.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tools = triton.knobs.nvidia
        usage = _run([tools.cuobjdump.path, "-res-usage", file.name])
        sass = _run([tools.nvdisasm.path, "-c", file.name])
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    wgmma = re.findall(r"\bHGMMA\S*\s+R\d+, (\S)", sass)
    shared = int(compiled.metadata.shared)
    fitting = occupancy(arch, registers, shared, int(compiled.metadata.num_warps))
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E\S*", sass)
    a = launch.arguments
    return {
        "kernel": launch.kernel.__name__,
        "launch": describe(launch),
        "arch": arch,
        "tile": [a.get(block) for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K")],
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        "maxnreg": launch.maxnreg,
        "planned": launch.programs,
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": shared,
        "HGMMA": len(wgmma),
        "HMMA": len(re.findall(r"\bHMMA\b", sass)),
        "UTCMMA": len(re.findall(r"\bUTC\w*MMA", sass)),
        "A from": "" if not wgmma else "registers" if "R" in wgmma else "shared memory",
        "loads": len(loads),
        "16-byte loads": sum(".128" in load for load in loads),
        "occupancy": fitting,
        "programs": programs(launch),
        "waves": round(programs(launch) / (MULTIPROCESSORS[arch] * fitting), 2) if fitting else None,
    }


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def failures(row: dict[str, Any], depth: int) -> list[str]:
    """What a row breaks.

    Spills, shared memory past the device's limit, fewer programs a multiprocessor than the tile counts on, and at
    least 32 channels convolved without wgmma.
    """
    broken = []
    if row["spills"]:
        broken.append(f"{row['spills']} spill instructions")
    if row["shared"] > SHARED_LIMIT[row["arch"]][0]:
        broken.append(f"{row['shared']} bytes of shared memory, limit {SHARED_LIMIT[row['arch']][0]}")
    if 8 * row["occupancy"] < 7 * row["planned"]:  # another compiler's registers may cost one of eight
        broken.append(f"{row['occupancy']} programs a multiprocessor, the tile counts on {row['planned']}")
    if row["arch"] == 90 and depth >= 32 and not row["HGMMA"]:
        broken.append("no HGMMA")
    return broken


def conv_depth(launch: KernelLaunch) -> int:
    """The smaller channel count of a convolution, 0 for other kernels."""
    a = launch.arguments
    return min(a["C"], a["CO"]) if "KERNEL" in a and "CO" in a else 0


COLUMNS = {
    "arch": ("arch", 4), "regs": ("registers", 4), "spill": ("spills", 5), "shared": ("shared", 7),
    "HGMMA": ("HGMMA", 5), "HMMA": ("HMMA", 4), "UTC": ("UTCMMA", 3), "A from": ("A from", 13), "loads": ("loads", 5),
    "16 B": ("16-byte loads", 4), "occ": ("occupancy", 3), "programs": ("programs", 8), "waves": ("waves", 6),
}  # fmt: skip


def report(
    arches: list[int], networks: list[str], every: int, say: Callable[[str], None], batch: int | None = None
) -> list[dict[str, Any]]:
    rows = []
    say(" ".join(f"{title:>{width}}" for title, (_, width) in COLUMNS.items()) + "  tile")
    for arch in arches:
        seen: dict[str, tuple[KernelLaunch, list[str]]] = {}
        with assume_arch(arch):
            for network in networks:
                for found, launch in record(network, batch=batch).items():
                    known, users = seen.get(found, (launch, []))
                    seen[found] = max(known, launch, key=programs), [*users, network]
        for launch, users in list(seen.values())[::every]:
            row = compile_launch(launch, arch) | {"networks": users}
            row["fails"] = failures(row, conv_depth(launch))
            rows.append(row)
            figures = " ".join(f"{row[name]!s:>{width}}" for name, width in COLUMNS.values())
            what = f"{row['tile']} w{row['warps']} s{row['stages']}  {row['kernel']} {row['launch']}"
            say(f"{figures}  {what}" + "".join(f"  ← {broken}" for broken in row["fails"]))
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """One line: how many kernels, how many fail, and which comes off worst."""
    worst = min(rows, key=lambda row: (-row["spills"], row["occupancy"], -row["registers"]))
    return (
        f"{len(rows)} kernels compiled, {sum(bool(row['fails']) for row in rows)} failing, "
        f"{sum(row['spills'] for row in rows)} spill instructions; worst: {worst['spills']} spills, "
        f"{worst['registers']} registers, {worst['occupancy']} programs a multiprocessor, sm_{worst['arch']} "
        f"{worst['kernel']} {worst['launch']}"
    )


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=sorted(SHARED_LIMIT))
    parser.add_argument(
        "--networks", nargs="+", default=[name for name in NETWORKS if name != "sample"], choices=list(NETWORKS)
    )
    parser.add_argument("--every", type=int, default=1, help="compile only every n-th launch")
    parser.add_argument("--batch", type=int, help="images of a batch (each network's own without it)")
    parser.add_argument("--only", choices=["triton", "cuda"], help="one kind of kernels; the other's rows stay in FILE")
    parser.add_argument("--json")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    rows: list[dict[str, Any]] = []
    if options.only != "cuda":
        rows += report(options.arch, options.networks, options.every, say, options.batch)
        print(summary(rows))
    if options.only != "triton":
        cuda = cuda_report.report(options.arch, say)
        print(f"{len(cuda)} CUDA kernels compiled, {sum(bool(row['fails']) for row in cuda)} failing")
        rows += cuda
    failing = any(row["fails"] for row in rows)
    if options.only and options.json and os.path.exists(options.json):
        with open(options.json) as file:
            other = [
                row for row in json.load(file)["rows"] if (row.get("compiler") == "nvcc") != (options.only == "cuda")
            ]
        rows = [*rows, *other] if options.only == "triton" else [*other, *rows]
    if options.json:
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        with open(options.json, "w") as file:
            file.write(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    return int(failing)


if __name__ == "__main__":
    sys.exit(main())

"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory, tensor-core instructions.

    python -m bench.kernel_report --arch 80 90 100 --json FILE [--networks wrn28_4 resnet32]

The four passes of a training step are run over each network with launches recorded instead of done; each distinct
launch is then compiled for the architecture and its machine code read.
"""

import argparse
import json
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

from fastensdistill.engine.passes import run_part
from fastensdistill.engine.weights import Weights
from fastensdistill.kernels import triton_utils
from fastensdistill.kernels.augment import augment
from fastensdistill.kernels.tiles import assume_arch
from fastensdistill.models import create_model
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.network.plan import plan_step
from fastensdistill.network.trace import trace

# compute capability: shared memory of one block and of one multiprocessor, in bytes (CUDA programming guide)
SHARED_LIMIT = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024), 100: (227 * 1024, 228 * 1024)}
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


# name → image size, classes, images of a batch; "sample" is a small PreResNet with every kind of launch, for tests
NETWORKS = {
    "wrn28_4": (32, 100, 128),
    "wrn28_10": (32, 100, 128),
    "resnet32": (32, 100, 128),
    "resnet18": (224, 1000, 16),
    "sample": (32, 100, 128),
}


def record(name: str, groups: int = 4) -> list[triton_utils.Launch]:
    """The distinct launches of one training step with the paper's perturbation, M = K = ``groups``.

    The plan is run as the engine runs it, on tensors that are never touched. Tiles are those of the arch assumed.
    """
    size, classes, batch = NETWORKS[name]
    sample = name == "sample"
    module = PreResNet(classes, blocks=(1, 1), widen=4) if sample else create_model(name, num_classes=classes)
    network = trace(module, (3, size, size))
    left: dict[bool, tuple[Weights, dict[str, Any]]] = {}
    with triton_utils.record_launches() as launches:
        for plan in plan_step(network, network, groups, groups, batch).values():
            for part in plan.parts:
                count = len(part.groups)
                if part.launches[0].op != "conv":  # backward: with what the forward pass left
                    weights, buffers = left.pop(part.training)
                    buffers[f"{network.output}.grad"] = torch.empty(count, batch, classes)
                else:
                    weights = Weights(part, count, torch.bfloat16)
                    buffers = {"input": torch.empty(1, batch, size, size, 3)}
                    left[part.training] = weights, buffers
                run_part(part, weights, torch.arange(count, dtype=torch.int32), buffers)
        shifts, flips = torch.empty(batch, 2, dtype=torch.int32), torch.empty(batch, dtype=torch.uint8)
        images, index = torch.empty(64, size, size, 3, dtype=torch.uint8), torch.empty(batch, dtype=torch.int64)
        augment(images, index, shifts, flips)
    return list({_key(launch): _without_values(launch) for launch in launches}.values())


def _without_values(launch: triton_utils.Launch) -> triton_utils.Launch:
    """The launch with empty tensors in the place of its own, which would keep a network's memory."""
    arguments = {k: v.new_empty(0) if isinstance(v, Tensor) else v for k, v in launch.arguments.items()}
    return launch._replace(arguments=arguments)


def _signature(launch: triton_utils.Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Argument types, constants and alignment as Triton's own launcher would specialise them."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        aligned = False
        if isinstance(value, Tensor):
            signature[name], aligned = POINTERS[value.dtype], True
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name], aligned = "i64" if abs(value) >= 2**31 else "i32", value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _key(launch: triton_utils.Launch) -> str:
    return repr((launch.kernel.__name__, _signature(launch), launch.num_warps, launch.num_stages))


def _describe(launch: triton_utils.Launch) -> str:
    """The launch in a few words: shape, then what is fused."""
    a = launch.arguments
    words = []
    if "KERNEL" in a:
        shape = f"{a['KERNEL']}x{a['KERNEL']} s{a['STRIDE']} {a['C']}"
        words.append(f"{shape}→{a['CO']} @{a['H']}" if "CO" in a else f"{shape} @{a['H']}")
    elif "C" in a:
        words.append(f"{a['C']} channels")
    fused = ("p_in_scale", "p_bias", "p_residual", "p_mask", "p_scale", "p_next_scale", "p_center", "p_mean")
    words += [name[2:] for name in fused if isinstance(a.get(name), Tensor)]
    return " ".join(words)


def occupancy(arch: int, registers: int, shared: int, warps: int) -> int:
    """Programs that fit one multiprocessor: 65,536 registers, its shared memory (1 KB reserved each), 64 warps."""
    per_warp = -(-max(registers, 16) * 32 // 256) * 256
    by_shared = SHARED_LIMIT[arch][1] // (shared + 1024)
    return min(65536 // (per_warp * warps), by_shared, 64 // warps, 32)


def compile_launch(launch: triton_utils.Launch, arch: int) -> dict[str, Any]:
    """One row of the report."""
    signature, constants, attributes = _signature(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
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
    a = launch.arguments
    return {
        "kernel": launch.kernel.__name__,
        "launch": _describe(launch),
        "arch": arch,
        "tile": [a.get(block) for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K")],
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": shared,
        "HGMMA": len(wgmma),
        "HMMA": len(re.findall(r"\bHMMA\b", sass)),
        "UTCMMA": len(re.findall(r"\bUTC\w*MMA", sass)),
        "A from": "" if not wgmma else "registers" if "R" in wgmma else "shared memory",
        "occupancy": occupancy(arch, registers, shared, int(compiled.metadata.num_warps)),
    }


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def failures(row: dict[str, Any], depth: int) -> list[str]:
    """What a row breaks: spills, shared memory past the device's limit, ≥ 32 channels convolved without wgmma."""
    broken = []
    if row["spills"]:
        broken.append(f"{row['spills']} spill instructions")
    if row["shared"] > SHARED_LIMIT[row["arch"]][0]:
        broken.append(f"{row['shared']} bytes of shared memory, limit {SHARED_LIMIT[row['arch']][0]}")
    if row["arch"] == 90 and depth >= 32 and not row["HGMMA"]:
        broken.append("no HGMMA")
    return broken


def conv_depth(launch: triton_utils.Launch) -> int:
    """The smaller channel count of a convolution, 0 for other kernels."""
    a = launch.arguments
    return min(a["C"], a["CO"]) if "KERNEL" in a and "CO" in a else 0


def report(arches: list[int], networks: list[str], every: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    titles = ("arch", "regs", "spill", "shared", "HGMMA", "HMMA", "UTC", "A from", "occ")
    keys = ("arch", "registers", "spills", "shared", "HGMMA", "HMMA", "UTCMMA", "A from", "occupancy")
    widths = (4, 4, 5, 7, 5, 4, 3, 13, 3)
    say(" ".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)) + "  tile")
    for arch in arches:
        seen: dict[str, tuple[triton_utils.Launch, list[str]]] = {}
        with assume_arch(arch):
            for network in networks:
                for launch in record(network):
                    seen.setdefault(_key(launch), (launch, []))[1].append(network)
        for launch, users in list(seen.values())[::every]:
            row = compile_launch(launch, arch) | {"networks": users}
            row["fails"] = failures(row, conv_depth(launch))
            rows.append(row)
            figures = " ".join(f"{row[key]!s:>{width}}" for key, width in zip(keys, widths, strict=True))
            what = f"{row['tile']} w{row['warps']} s{row['stages']}  {row['kernel']} {row['launch']}"
            say(f"{figures}  {what}" + "".join(f"  ← {broken}" for broken in row["fails"]))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=sorted(SHARED_LIMIT))
    parser.add_argument(
        "--networks", nargs="+", default=[name for name in NETWORKS if name != "sample"], choices=list(NETWORKS)
    )
    parser.add_argument("--every", type=int, default=1, help="compile only every n-th launch")
    parser.add_argument("--json")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    rows = report(options.arch, options.networks, options.every, lambda line: print(line, flush=True))
    failed = sum(bool(row["fails"]) for row in rows)
    print(f"{len(rows)} kernels compiled, {failed} failing")
    if options.json:
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        with open(options.json, "w") as file:
            file.write(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

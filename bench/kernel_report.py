"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory, tensor-core instructions.

    python -m bench.kernel_report --arch 80 90 100 --json FILE [--networks wrn28_4 resnet32]

Every op is called as the plans of the networks call it, with launches recorded instead of run; each distinct launch is
then compiled for the architecture and its machine code read.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastensdistill.kernels import triton_utils
from fastensdistill.kernels.augment import augment
from fastensdistill.kernels.batch_norm import batch_norm_apply, batch_norm_statistics
from fastensdistill.kernels.batch_norm_backward import batch_norm_backward, batch_norm_backward_statistics
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient
from fastensdistill.kernels.grouped_conv import grouped_conv, out_size
from fastensdistill.kernels.head import head
from fastensdistill.kernels.head_backward import head_backward
from fastensdistill.kernels.pool import max_pool, max_pool_backward, mean_pool
from fastensdistill.kernels.tiles import assume_arch

# compute capability: shared memory of one block and of one multiprocessor, in bytes (CUDA programming guide)
SHARED_LIMIT = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024), 100: (227 * 1024, 228 * 1024)}
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip


class Conv(NamedTuple):
    """One convolution of a network and how it sits there."""

    channels: int
    out_channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    place: str = "first"  # stem, first or second of a block, shortcut

    @property
    def padding(self) -> int:
        return self.kernel // 2


def _pre_activation(widen: int) -> list[Conv]:
    convs, channels, size = [Conv(3, 16, 32, place="stem")], 16, 32
    for i in range(3):
        width, stride = 16 * widen * 2**i, 2 if i else 1
        convs += [Conv(channels, width, size, 3, stride, "first"), Conv(channels, width, size, 1, stride, "shortcut")]
        channels, size = width, size // stride
        convs += [Conv(width, width, size, place="second"), Conv(width, width, size, place="first")]
    return convs


def _post_activation(widths: list[int], size: int, stem: Conv, projection: bool) -> list[Conv]:
    convs, channels = [stem], stem.out_channels
    for width in widths:
        stride = 2 if width != channels else 1
        if stride == 2:
            convs.append(Conv(channels, width, size, 3, 2, "first"))
            convs += [Conv(channels, width, size, 1, 2, "shortcut")] * projection
        channels, size = width, size // stride
        convs += [Conv(width, width, size, place="second"), Conv(width, width, size, place="first")]
    return convs


NETWORKS: dict[str, tuple[list[Conv], int, int, bool]] = {
    # convolutions, last size, classes, whether BatchNorm and ReLU come before the convolution
    "wrn28_4": (_pre_activation(4), 8, 100, True),
    "wrn28_10": (_pre_activation(10), 8, 100, True),
    "resnet32": (_post_activation([16, 32, 64], 32, Conv(3, 16, 32, place="stem"), False), 8, 100, False),
    "resnet18": (
        _post_activation([64, 128, 256, 512], 56, Conv(3, 64, 224, 7, 2, "stem"), True), 7, 1000, False,
    ),
}  # fmt: skip


def _call_conv(conv: Conv, images: int, groups: int, before: bool) -> None:
    """Every form in which the passes use one convolution: perturbation, distillation, and both backward."""
    low, full = torch.bfloat16, torch.float32
    n_in, n_out, place = conv.channels, conv.out_channels, conv.place
    shape = {"kernel": conv.kernel, "stride": conv.stride, "padding": conv.padding}
    out = out_size(conv.size, conv.kernel, conv.stride, conv.padding)
    slots = torch.empty(groups, dtype=torch.int32)

    def rows(channels: int, count: int = groups) -> Tensor:
        return torch.empty(count, channels)

    stem = place == "stem"
    x = torch.empty(1 if stem else groups, images, conv.size, conv.size, n_in, dtype=full if stem else low)
    weight = torch.empty(groups, conv.kernel**2, n_in, n_out, dtype=low)
    flipped = torch.empty(groups, conv.kernel**2, n_out, n_in, dtype=low)
    y = torch.empty(groups, images, out, out, n_out, dtype=low)
    affine: dict[str, Any] = {"in_scale": rows(3, 1), "in_shift": rows(3, 1)} if stem else {}
    following: dict[str, Any] = {}
    if place == "shortcut":
        following = {"bias": None if before else rows(n_out)}
    elif not before:
        following = {"bias": rows(n_out), "relu": True, "mask": True, "residual": y if place == "second" else None}
    elif place == "first":
        following = {"bias": rows(n_out), "relu": True, "mask": True}
    else:
        second = y if place == "second" else None
        following = {"next_scale": rows(n_out), "next_shift": rows(n_out), "mask": True, "residual": second}
    grouped_conv(x, weight, slots, **shape, **affine, **following)
    training = {"center": rows(n_out, 1)} if not (before and place == "shortcut") else {}
    if before and place == "second":
        training["residual"] = y
    grouped_conv(x, weight, slots, **shape, **affine, **training)
    conv_weight_gradient(x, y, **shape, **affine)
    if stem:
        if conv.kernel == 3:
            conv_data_gradient(
                y, flipped, slots, in_size=(conv.size,) * 2, **shape, scale=rows(3, 1), out_dtype=torch.float32
            )
        return
    bits = torch.empty(groups, images, conv.size, conv.size, -(-n_in // 8), dtype=torch.uint8)
    behind: dict[str, Any] = dict(in_size=(conv.size, conv.size), **shape)
    if place == "shortcut":
        conv_data_gradient(y, flipped, slots, **behind)
        return
    extra: dict[str, Any] = {}
    if place == "first":
        extra = {"residual": x, "residual_first": not before, "scale": rows(n_in) if before else None}
    conv_data_gradient(y, flipped, slots, **behind, mask=bits, **extra)
    sums: dict[str, Any] = {"z": x, "mean": rows(n_in, 1), "inv_std": rows(n_in, 1), "mask": bits}
    if place == "first" and not before:
        sums |= {"residual": x, "residual_first": True}
    conv_data_gradient(y, flipped, slots, **behind, **sums)


def _call_rest(channels: int, size: int, images: int, groups: int, before: bool) -> None:
    z = torch.empty(groups, images, size, size, channels, dtype=torch.bfloat16)
    row, rows = torch.empty(1, channels), torch.empty(groups, channels)
    partials = torch.empty(groups, 64, 2, channels)
    batch_norm_statistics(partials, 4096, row, row.clone(), row.clone(), row.clone())
    batch_norm_statistics(partials, 1024, rows, rows.clone(), rows.clone(), rows.clone())
    bits = batch_norm_apply(z, row, row.clone(), mask=True).mask
    if not before:
        batch_norm_apply(z, row, row.clone(), residual=z, mask=True)
    sums = batch_norm_backward_statistics(z, z, row, row.clone(), mask=bits)
    batch_norm_backward(z, z, sums.statistics, 4096, row, row.clone(), row.clone(), residual=z if before else None)


def _call_head(channels: int, size: int, classes: int, images: int, groups: int, before: bool) -> None:
    z = torch.empty(groups, images, size, size, channels, dtype=torch.bfloat16)
    row = torch.empty(1, channels)
    weight, bias = torch.empty(groups, channels, classes, dtype=torch.bfloat16), torch.empty(groups, classes)
    slots = torch.empty(groups, dtype=torch.int32)
    scaling: dict[str, Any] = {"scale": row, "shift": row.clone()} if before else {"relu": False}
    logits, pooled = head(z, weight, bias, slots, **scaling)
    head_backward(logits, z, weight, slots, **scaling)
    training: dict[str, Any] = {"mean": row.clone(), "inv_std": row.clone()} if before else {}
    head_backward(logits, z, weight, slots, **scaling, **training, pooled=pooled)


def record(network: str, images: int = 128, groups: int = 4) -> list[triton_utils.Launch]:
    """The distinct launches of one network's passes, for the architecture assumed."""
    convs, last, classes, before = NETWORKS[network]
    if network == "resnet18":
        images //= 4  # 224 x 224
    with triton_utils.record_launches() as launches:
        for conv in convs:
            _call_conv(conv, images, groups, before)
        places = {(c.out_channels, out_size(c.size, c.kernel, c.stride, c.padding)) for c in convs}
        for channels, size in sorted(places):
            _call_rest(channels, size, images, groups, before)
        _call_head(convs[-1].out_channels, last, classes, images, groups, before)
        if network == "resnet18":
            x = torch.empty(groups, images, 112, 112, 64, dtype=torch.bfloat16)
            y, taps = max_pool(x, kernel=3, stride=2, padding=1)
            max_pool_backward(y, taps, in_size=(112, 112), kernel=3, stride=2, padding=1)
            mean_pool(x)
        if network == "wrn28_4":
            indices = torch.empty(images, dtype=torch.int64)
            shifts, flips = torch.empty(images, 2, dtype=torch.int32), torch.empty(images, dtype=torch.uint8)
            augment(torch.empty(64, 32, 32, 3, dtype=torch.uint8), indices, shifts, flips)
    return list({_key(launch): launch for launch in launches}.values())


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


def report(arches: list[int], networks: list[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
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
        for launch, users in seen.values():
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
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--json")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    rows = report(options.arch, options.networks, lambda line: print(line, flush=True))
    failed = sum(bool(row["fails"]) for row in rows)
    print(f"{len(rows)} kernels compiled, {failed} failing")
    if options.json:
        lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        with open(options.json, "w") as file:
            file.write(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

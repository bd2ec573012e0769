"""One stage, in a process of its own:  python -m bench.gpu_run.stage NAME --out DIR [--rehearse] [--plant FAULT …]

What it finds it appends to DIR/results.jsonl. It ends with 0, or with the error that stopped it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import contenders, roof
from bench.common import ROOT, describe_host, synchronize
from bench.contenders import CONTENDERS, changes, fused_engine, how
from bench.gpu_run import BEGAN, measurements, proving, timing, warm
from bench.gpu_run.captures import diagnose_capture
from bench.gpu_run.context import REHEARSED, Context, Sizes
from bench.gpu_run.faults import planted
from bench.gpu_run.launches import check_launches
from bench.gpu_run.record import Record, Row, read
from bench.gpu_run.remedies import NAME as REMEDIES
from bench.gpu_run.remedies import Remedies, replaced
from bench.gpu_run.stages import NO_DEVICE, RESULTS, STAGES
from bench.gpu_run.steps import COVERED, METHODS, check_step
from bench.gpu_run.walk import walk
from bench.peers import captured
from bench.setting import Setting, batches, drawn_pairs, make
from fastensdistill.engine import dispatch
from fastensdistill.kernels import extension
from fastensdistill.kernels.launch import HAS_TRITON

PIECE = 15 << 20  # bytes of one file of packed caches


def device(context: Context) -> None:
    """What a number means nothing without, and what the card holds in practice."""
    if not context.rehearse and not torch.cuda.is_available():
        raise SystemExit(NO_DEVICE)
    smi = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={smi}", "--format=csv,noheader"], capture_output=True, text=True
    ) if shutil.which("nvidia-smi") else None  # fmt: skip
    row: Row = describe_host(context.device)
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        row |= {"memory_gib": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count,
                "arch": 10 * properties.major + properties.minor}  # fmt: skip
    row["nvidia_smi"] = asked.stdout.strip() if asked and asked.returncode == 0 else None
    row["extension"] = extension.describe()
    context.record.add("device", **row)
    gpu, found = roof.measure(context.device, smoke=context.rehearse, rounds=5)
    context.record.add("roof", name=gpu.name, **found)


def arch_of(context: Context) -> int:
    """Compute capability, without a CUDA context: processes are forked afterwards."""
    for row in read(context.record.path):
        if row["kind"] == "device" and "arch" in row:
            return int(row["arch"])
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    return int(done.stdout.split()[0].replace(".", "")) if done and done.returncode == 0 else 90


def build_extension(context: Context) -> None:
    """Nothing where the library that was carried loads; else it is built, for this device alone."""
    found = extension.describe()
    if found["loaded"] or context.rehearse:
        context.record.add("extension", built=False, **found)
        return
    arch = arch_of(context)
    name = f"{arch // 10}.{arch % 10}" + ("a" if arch >= 90 else "")
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"TORCH_CUDA_ARCH_LIST": name},
    )  # fmt: skip
    said = (done.stderr or done.stdout).strip().splitlines()
    check = "import json; from fastensdistill.kernels import extension; print(json.dumps(extension.describe()))"
    after = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    loaded: dict[str, Any] = json.loads(after.stdout.splitlines()[-1]) if after.returncode == 0 else {}
    context.record.add(
        "extension", built=True, seconds=time.perf_counter() - began, before=found["reason"], said=said[-1:], **loaded
    )


def compile_kernels(context: Context, *networks: str) -> None:
    if not HAS_TRITON:
        context.record.add("warm", left_out="Triton is not installed")
        return
    sizes, images = context.sizes, warm.IMAGES
    settings = [Setting(name, "tdiv-sdiv", images, sizes.members) for name in networks]
    settings += [Setting("tiny", method, images, sizes.members) for method in METHODS]
    settings += [Setting(COVERED, METHODS[0], images, sizes.members)]
    launches = warm.recorded(list(dict.fromkeys(settings)), arch_of(context))
    if context.rehearse:
        launches = launches[::8]  # a few of each kind: a GPU's machine has more processes for them
    workers = max(1, (os.cpu_count() or 2) - 2) if not context.rehearse else 2
    found = warm.compile_all(launches, arch_of(context), workers)
    context.record.add("warm", **found)


def smoke(context: Context) -> None:
    """One tiny step launched from Python, then one captured: does anything work at all?"""
    setting = replace(context.sizes.odd, batch=context.sizes.tiny)
    given = batches(setting, 2, context.device, drawn_pairs(setting, 0, 2), torch.float32)
    found: dict[str, Any] = {}
    for capture in (False, True):
        began = time.perf_counter()
        problem = make(setting, context.device).copy(torch.float32, "fp32" if context.rehearse else "bf16")
        step = fused_engine(problem, capture=capture)
        found[str(capture)] = changes(step, given)
        synchronize(context.device)
        context.record.add("smoke", asked_to_capture=capture, seconds=time.perf_counter() - began, **how(step))
    same = all(torch.equal(value, found["False"][kind]) for kind, value in found["True"].items())
    context.record.add("smoke", same=same)


def csrc(context: Context) -> None:
    """The extension's tests on the device, by pytest, which a bare machine may lack."""
    if importlib.util.find_spec("pytest") is None:
        context.record.add("csrc", left_out="pytest is not installed")
        return
    options = ["--tb=line", *(["--collect-only"] if context.rehearse else [])]
    tests = ["tests/kernels/test_csrc_gpu.py", "tests/kernels/test_halo_conv.py"]
    pytest_run(context, "csrc", ["-m", "gpu", *options, *tests])
    # on whatever device there is
    pytest_run(context, "csrc", [*options, "tests/kernels/test_unfold.py", "tests/kernels/test_given_memory.py"])


def sanitize(context: Context) -> None:
    """A program without PyTorch runs every launcher, by itself and under each of the tools."""
    if context.rehearse:
        context.record.add("sanitize", left_out="rehearsal")
        return
    command = [sys.executable, "-m", "tests.kernels.sanitize", "--build", str(context.out / "sanitize"), "--run"]
    arch = arch_of(context)
    command += ["--arch", f"{arch}{'a' if arch >= 90 else ''}", "--limit", str(int(context.seconds / 3))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    wrong = [line for line in lines if "wrong" in line.lower() or "ERROR SUMMARY" in line]
    context.record.add("sanitize", ok=done.returncode == 0, status=done.returncode, last=lines[-6:], said=wrong[:20])
    print("\n".join(lines))


def every_test(context: Context) -> None:
    pytest_run(context, "tests", ["-m", "gpu", "--tb=short", "tests"])


def pytest_run(context: Context, kind: str, arguments: Sequence[str]) -> None:
    """Pytest's last lines; what fails is a finding, not the end of the stage."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    lines = (done.stdout + done.stderr).strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    context.record.add(kind, ok=done.returncode == 0, last=lines[-1:], failed=failed[:20])
    print(done.stdout[-20000:])


def pack(context: Context) -> None:
    """Compiled kernels, their launchers, the peer's cache and the extension, in files of at most ``PIECE`` bytes."""
    folder = context.out / "caches"
    archive = context.out / "caches.tgz"
    if extension.describe()["loaded"]:
        (folder / "extension").mkdir(parents=True, exist_ok=True)
        for file in (extension.LIBRARY, extension.BUILD_REPORT):
            shutil.copy2(file, folder / "extension")
    with tarfile.open(archive, "w:gz") as tar:
        if folder.exists():
            tar.add(folder, "caches")
    data = archive.read_bytes()
    archive.unlink()
    pieces = [data[i : i + PIECE] for i in range(0, len(data), PIECE)]
    for i, piece in enumerate(pieces):
        (context.out / f"caches.tgz.{i}").write_bytes(piece)
    context.record.add("packed", bytes=len(data), files=len(pieces))


def command(context: Context, name: str, module: Sequence[str]) -> None:
    """A benchmark's own command; its results file lies beside ours."""
    file = context.out / f"{name}.json"
    more = ["--smoke"] if context.rehearse else []
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{module[0]}", *module[1:], "--json", str(file), *more], cwd=ROOT
    )
    context.record.add("command", module=module[0], status=done.returncode, file=file.name)


def odd(context: Context) -> Setting:
    return context.sizes.odd


def covered(context: Context) -> Setting:
    """One of which the wgmma kernels compute something."""
    return Setting(COVERED, "tdiv-sdiv", 2, 2) if context.rehearse else small(context)


def small(context: Context) -> Setting:
    return context.setting(context.sizes.small)


def large(context: Context) -> Setting:
    return context.setting(context.sizes.batches[0])


RUN: dict[str, Callable[[Context], object]] = {
    "device": device,
    "extension": build_extension,
    "warm": lambda c: compile_kernels(c, c.sizes.network),
    "warm-other": lambda c: compile_kernels(c, c.sizes.network, c.sizes.other),
    "compile-peer": timing.compile_peer,
    "smoke": smoke,
    "launches-odd": lambda c: check_launches(c, odd(c)),
    "launches": lambda c: check_launches(c, small(c)),
    "driver": lambda c: proving.check_driver(c, arch_of(c)),
    "prove": proving.prove,
    "wgmma": lambda c: check_launches(c, covered(c), by_wgmma=True),
    "measure": measurements.measure,
    "warps-4": lambda c: check_launches(c, small(c), 4),
    "warps-8": lambda c: check_launches(c, small(c), 8),
    "step": check_step,
    "walk": lambda c: walk(c, replace(odd(c), batch=c.sizes.tiny)),
    "captures": lambda c: diagnose_capture(c, replace(odd(c), batch=c.sizes.tiny)),
    "first": lambda c: timing.first(c, sizes=c.sizes.batches[:1]),
    "table": lambda c: timing.table(c, ["fused", "fused-triton", "compiled"], large(c)),
    "kernels": timing.every_launch,
    "tuned": timing.tuned,
    "other-first": lambda c: timing.first(c, c.sizes.other),
    "other": lambda c: timing.table(c, ["fused", "captured", "compiled"], c.setting(c.sizes.batches[0], c.sizes.other)),
    "small": lambda c: timing.table(c, ["fused", "fused-launched", "captured"], c.setting(c.sizes.batches[-1])),
    "tiers": lambda c: timing.table(c, ["fused", "reference-captured", "reference"], c.sizes.tiers),
    "csrc": csrc,
    "sanitize": sanitize,
    "counters": timing.counters,
    "tests": every_test,
    "pack": pack,
}
CHECKS = ("launches-odd", "launches", "wgmma", "warps-4", "warps-8")  # they find remedies; the others obey them


def planted_for(plants: Sequence[str], name: str) -> list[str]:
    """The faults of this stage: "hang", "kill", "raise", "memory", which a plant gives as FAULT=STAGE."""
    return [fault for fault, _, stage in (plant.partition("=") for plant in plants) if stage == name]


class Killed(Record):
    """Kills its process when the third record has been written, or at the stage's end."""

    left = 3

    def add(self, kind: str, **values: Any) -> Row:
        row = super().add(kind, **values)
        self.left -= 1
        if self.left == 0:
            self.kill()
        return row

    @staticmethod
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def rehearsal(context: Context, name: str) -> Iterator[None]:
    """The CPU in the place of a device: every contender takes part, and torch.compile hands back what it was given."""
    if not context.rehearse:
        yield
        return
    faults = planted_for(context.plants, name)
    captured.CAPTURED.update(disable=True)
    for key, contender in CONTENDERS.items():
        CONTENDERS[key] = replace(contender, devices=("cpu", "cuda"))

    def no_memory(problem: Any) -> Any:
        raise torch.OutOfMemoryError("planted: CUDA out of memory")

    predicted = tuple(replace(row, arch=None) for row in dispatch.PREDICTED)
    for peer in ("captured", "compiled") if "memory" in faults else ():
        CONTENDERS[peer] = replace(CONTENDERS[peer], build=no_memory)
    with (
        planted([plant for plant in context.plants if "=" not in plant]),
        replaced(dispatch, "PREDICTED", predicted),
    ):
        if "hang" in faults:
            time.sleep(3600)
        if "raise" in faults:
            raise RuntimeError("planted: this stage raises")
        yield


def main(argv: Sequence[str] | None = None, began: float = BEGAN) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*(stage.name for stage in STAGES), "some"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--plant", nargs="*", default=[])
    parser.add_argument("--launch", type=int, nargs="+", help="of the stage some: which")
    options = parser.parse_args(argv)
    torch.set_num_threads(1 if options.rehearse else torch.get_num_threads())
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    name: str = options.name
    kind = Killed if "kill" in planted_for(options.plant, name) else Record
    context = Context(
        options.out, kind(options.out / RESULTS, name), options.rehearse, tuple(options.plant), options.seconds,
        REHEARSED if options.rehearse else Sizes(), began,
    )  # fmt: skip
    module = next((stage.module for stage in STAGES if stage.name == name), ())
    with contextlib.ExitStack() as stack:
        stack.enter_context(rehearsal(context, name))
        if name not in CHECKS:
            remedies = Remedies.load(context.out / REMEDIES)
            stack.enter_context(remedies.in_force())
            contenders.diagnosed = remedies.dispatch_on(context.device)
            if remedies.words:
                context.record.shared["remedies"] = remedies.words
                context.record.add("in force")
        if name == "some":
            timing.some(context, options.launch)
        elif module:
            command(context, name, module)
        else:
            RUN[name](context)
        if isinstance(context.record, Killed):
            context.record.kill()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

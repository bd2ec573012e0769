"""What a run tells: ``metrics.jsonl``, TensorBoard, and a progress display; none of it makes the device wait.

Scalars are summed on the device. Every few steps their sums start on their way to the host, and are read when the next
ones start: by then they have arrived. Of several processes they are means over all, and all see the same.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastensdistill.engine import parallel
from fastensdistill.errors import InputError
from fastensdistill.files import write_atomically


class DivergedError(InputError):
    """The loss became NaN or infinite; the last checkpoint is from before."""


class Meter:
    """Means of device scalars over the steps between two readings, and the first step whose loss was not finite."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.bad: Tensor | None = None
        self.pending: tuple[dict[str, Any], list[str], int, Tensor, Any] | None = None

    def add(self, step: int, scalars: dict[str, Tensor]) -> None:
        loss = scalars["loss"]
        if self.bad is None:
            self.bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
        broken = (self.bad < 0) & ~torch.isfinite(loss.mean())
        self.bad = torch.where(broken, step, self.bad)
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1

    def start_reading(self, context: dict[str, Any]) -> None:
        """Send the means of the steps since the last call on their way, to be fetched by :meth:`read`."""
        assert self.pending is None
        assert self.bad is not None
        names, sums = list(self.sums), list(self.sums.values())
        bad = torch.where(self.bad < 0, math.inf, self.bad.double()).view(1)
        values = torch.cat([s.detach().double().flatten() for s in sums])
        parallel.least(bad)
        parallel.average(values)
        packed = torch.cat([bad, values])
        event = None
        if packed.is_cuda:
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            packed = host
        self.pending = ({**context, "sizes": [s.numel() for s in sums]}, names, self.count, packed, event)
        self.sums, self.count = {}, 0

    def read(self) -> dict[str, Any] | None:
        """The record whose reading was started last, or None. Raises DivergedError if a loss was not finite."""
        if self.pending is None:
            return None
        context, names, count, packed, event = self.pending
        self.pending = None
        if event is not None:
            event.synchronize()
        bad, *values = packed.tolist()
        sizes = context.pop("sizes")
        for name, size in zip(names, sizes, strict=True):
            mine, values = [v / count for v in values[:size]], values[size:]
            context[name] = mine[0] if size == 1 else mine
        if bad < math.inf:
            raise DivergedError(
                f"the loss is not finite since step {int(bad)}; stopped. Lower learning_rate, or use precision fp32 if "
                "it is another"
            )
        return context


class Recorder:
    """Writes records to ``metrics.jsonl`` (and TensorBoard) in ``folder`` and shows progress on a terminal.

    Without a folder, nothing is written. ``start_step`` > 0 continues a run: records after it are dropped first.
    """

    def __init__(self, folder: Path | None, *, title: str, total_steps: int, start_step: int = 0,
                 tensorboard: bool = False, quiet: bool = False):  # fmt: skip
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.meter = Meter()
        self.title, self.total_steps = title, total_steps
        self.writer = _tensorboard(folder, start_step) if tensorboard else None
        self.clock, self.clock_step = time.perf_counter(), start_step
        self.images_per_second = 0.0
        self.last: dict[str, Any] = {}
        if self.path is not None:
            _drop_after(self.path, start_step)
        interactive = sys.stderr.isatty() and not quiet
        self.quiet = quiet
        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(), disable=not interactive,
            console=Console(stderr=True),
        )  # fmt: skip
        self.interactive = interactive
        self.task = self.progress.add_task(title, total=total_steps, completed=start_step, note="")

    def __enter__(self) -> Recorder:
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def step(self, step: int, scalars: dict[str, Tensor]) -> None:
        self.meter.add(step, scalars)

    def train(self, step: int, epoch: float, rate: float, images: int) -> None:
        """Close the record of the last steps, each of ``images`` base images."""
        self.drain()
        now = time.perf_counter()
        self.images_per_second = (step - self.clock_step) * images / max(now - self.clock, 1e-9)
        self.clock, self.clock_step = now, step
        self.meter.start_reading({
            "event": "train", "step": step, "epoch": round(epoch, 4), "lr": rate,
            "images_per_second": round(self.images_per_second, 2),
        })  # fmt: skip
        self.progress.update(self.task, completed=step, note=self._note())

    def drain(self) -> None:
        record = self.meter.read()
        if record is not None:
            self.write(record)

    def pause(self) -> float:
        """Leave what follows (validation, saving) out of images/s until :meth:`resume`."""
        return time.perf_counter()

    def resume(self, paused_at: float) -> None:
        self.clock += time.perf_counter() - paused_at

    def validation(self, record: dict[str, Any]) -> None:
        self.write({"event": "validation", **record})
        self.progress.update(self.task, note=self._note())
        if not self.interactive and not self.quiet:
            accuracy = record["accuracy"]
            shown = " ".join(f"{100 * a:.2f}" for a in (accuracy if isinstance(accuracy, list) else [accuracy]))
            loss = self.last.get("loss", float("nan"))
            mean = sum(loss) / len(loss) if isinstance(loss, list) else loss
            print(
                f"{self.title}: epoch {record['epoch']:g}, step {record['step']}/{self.total_steps}, loss {mean:.4f}, "
                f"validation {shown} %, {self.images_per_second:.0f} images/s",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def write(self, record: dict[str, Any]) -> None:
        self.last = {**self.last, **record}
        if self.path is not None:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise InputError(f"cannot write {self.path}: {error.strerror}") from error
        if self.writer is not None:
            for name, value in record.items():
                if name in ("event", "step", "epoch"):
                    continue
                members = {f"/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {"": value}
                for suffix, v in members.items():
                    self.writer.add_scalar(f"{record['event']}/{name}{suffix}", v, record["step"])

    def _note(self) -> str:
        parts = []
        if "loss" in self.last:
            loss = self.last["loss"]
            parts.append(f"loss {(sum(loss) / len(loss)) if isinstance(loss, list) else loss:.4f}")
        if "accuracy" in self.last:
            accuracy = self.last["accuracy"]
            best = max(accuracy) if isinstance(accuracy, list) else accuracy
            parts.append(f"val {100 * best:.2f} %")
        return "  ".join([*parts, f"{self.images_per_second:.0f} images/s"])


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole records up to ``step``: those after it will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break  # the line the run was killed in
    write_atomically(path, "".join(kept).encode())


def _tensorboard(folder: Path | None, start_step: int) -> Any:
    if folder is None:
        raise InputError("tensorboard=True needs a run folder (out=)")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs its extra: pip install 'fastensdistill[tensorboard]'") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None)

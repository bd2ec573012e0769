"""What a run records: ``metrics.jsonl``, TensorBoard and a progress display, without host–device synchronisation.

Scalars are summed on the device. Sums are copied asynchronously every few steps and read one interval later. With
several processes they are means over all of them, the same on each.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastensdistill.engine import parallel
from fastensdistill.errors import InputError
from fastensdistill.files import write_atomically
from fastensdistill.train.progress import Piece, Progress, rate_in_words
from fastensdistill.train.schedule import is_validation_epoch

METRICS = "metrics.jsonl"


class DivergedError(InputError):
    """The loss became NaN or infinite; the last checkpoint is from before."""


class Meter:
    """Means of device scalars over the steps between two readings, and the first step whose loss was not finite.

    ``describe`` says in words how the step was made, for the error.
    """

    def __init__(self, describe: Callable[[int], str] = "step {}".format) -> None:
        self.describe = describe
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.bad: Tensor | None = None
        self.pending: tuple[dict[str, Any], list[str], int, Tensor, Any] | None = None

    def add(self, step: int, scalars: dict[str, Tensor]) -> None:
        """Add a step's scalars (tensors, which may still be computed) to the sums; nothing waits for the device."""
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
            raise DivergedError(f"the loss is not finite since {self.describe(int(bad))}")
        return context


class Recorder:
    """Writes records to ``metrics.jsonl`` (and TensorBoard) in ``folder`` and shows progress.

    Without a folder, nothing is written. ``start_step`` > 0 continues a run: records after it are dropped first.
    ``images`` is how many a step takes; ``describe`` as for :class:`Meter`.
    """

    def __init__(self, folder: Path | None, *, title: str, epochs: int, steps_per_epoch: int, images: int,
                 start_step: int = 0, tensorboard: bool = False, quiet: bool = False,
                 describe: Callable[[int], str] = "step {}".format):  # fmt: skip
        self.path = None if folder is None else folder / METRICS
        self.meter = Meter(describe)
        self.epochs, self.steps_per_epoch, self.images = epochs, steps_per_epoch, images
        self.writer = tensorboard_writer()(folder, start_step) if tensorboard else None
        self.clock, self.clock_step = time.perf_counter(), start_step
        self.images_per_second = 0.0
        self.last: dict[str, Any] = {}
        self.looked_at = -1  # the step of the last validation
        self.pauses: dict[bool, float] = {False: 0.0, True: 0.0}  # seconds that the last of each kind took
        if self.path is not None:
            _drop_after(self.path, start_step)
        self.progress = Progress(title, epochs * steps_per_epoch, done=start_step, quiet=quiet)
        self.progress.besides, self.progress.log_line = self._pauses_left, self._log_line

    def __enter__(self) -> Recorder:
        self.progress.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.__exit__(*exc)
        if self.writer is not None:
            self.writer.close()

    def step(self, step: int, scalars: dict[str, Tensor]) -> None:
        """The outcome of ``step``, of which nothing is read yet (unless it lies on the host)."""
        self.meter.add(step, scalars)
        if "loss" not in self.last and scalars["loss"].device.type == "cpu":
            self.last["loss"] = float(scalars["loss"].mean())
        self.progress.at(step + 1)
        self.progress.notes = self._notes()

    def train(self, step: int, epoch: float, rate: float) -> None:
        """Close the record of the last steps."""
        self.drain()
        now = time.perf_counter()
        self.images_per_second = (step - self.clock_step) * self.images / max(now - self.clock, 1e-9)
        self.clock, self.clock_step = now, step
        self.meter.start_reading({
            "event": "train", "step": step, "epoch": round(epoch, 4), "lr": rate,
            "images_per_second": round(self.images_per_second, 2),
        })  # fmt: skip

    def drain(self) -> None:
        """Write the interval whose sums are being read, if there is one."""
        record = self.meter.read()
        if record is not None:
            self.write(record)

    def pause(self) -> float:
        """Leave what follows (validation, saving) out of images/s until :meth:`resume`."""
        return time.perf_counter()

    def resume(self, paused_at: float, looked: bool) -> None:
        """``looked``: the pause was for a validation, not for saving alone."""
        seconds = time.perf_counter() - paused_at
        self.clock += seconds
        self.pauses[looked] = seconds
        self.progress.pace.skip(seconds)

    def validation(self, record: dict[str, Any]) -> None:
        """Write the record of a validation, and show it."""
        self.write({"event": "validation", **record})
        self.progress.notes = self._notes()
        self.looked_at = record["step"]
        self.progress.log()

    def kept(self, record: dict[str, Any], step: int) -> None:
        """What the run ends with after ``step``, as :func:`fastensdistill.train.keeping.as_record` puts it, and what
        the user is told of it (``said``, ``warnings``), for the report."""
        self.write({"event": "kept", "step": step, "epoch": float(self.epochs), **record})

    def write(self, record: dict[str, Any]) -> None:
        """Append a record to ``metrics.jsonl``. Raises InputError if the file cannot be written."""
        self.last = {**self.last, **record}
        if self.path is not None:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise InputError(f"cannot write {self.path}: {error.strerror}") from error
        if self.writer is not None:
            for name, value in record.items():
                if name in ("event", "step", "epoch", "said", "warnings"):
                    continue
                members = {f"/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {"": value}
                for suffix, v in members.items():
                    self.writer.add_scalar(f"{record['event']}/{name}{suffix}", v, record["step"])

    def _pauses_left(self) -> float:
        now = self.progress.pace.done // self.steps_per_epoch
        return sum(self.pauses[is_validation_epoch(e, self.epochs)] for e in range(now + 1, self.epochs + 1))

    def _loss(self) -> float:
        loss = self.last.get("loss", math.nan)
        return sum(loss) / len(loss) if isinstance(loss, list) else loss

    def _pace(self) -> str:
        seconds = self.progress.pace.per_step
        if seconds is None:
            return ""
        rate = f"{rate_in_words(self.images / max(seconds, 1e-9))} images/s"
        return f"{rate}, {rate_in_words(seconds)} s/step" if seconds >= 1 else rate

    def _notes(self) -> list[Piece]:
        notes = [Piece(f"loss {self._loss():.4f}", 7)] if "loss" in self.last else []
        if "accuracy" in self.last:
            accuracy = self.last["accuracy"]
            best = max(accuracy) if isinstance(accuracy, list) else accuracy
            notes.append(Piece(f"val {100 * best:.1f}%", 5))
        return [*notes, Piece(self._pace(), 4)] if self._pace() else notes

    def _log_line(self) -> str:
        step = self.progress.pace.done
        said = [f"epoch {round(step / self.steps_per_epoch, 2):g}/{self.epochs}", f"step {step}/{self.progress.total}"]
        if "loss" in self.last:
            said.append(f"loss {self._loss():.4f}")
        if step == self.looked_at:
            said.append(f"validation {_percent(self.last['accuracy'])} %")
            if "ema_accuracy" in self.last:
                said[-1] += f", EMA {_percent(self.last['ema_accuracy'])} %"
        if self._pace():
            said.append(self._pace())
        return f"{self.progress.title}: {', '.join([*said, self.progress.left_in_words()])}"


def _percent(accuracy: float | list[float]) -> str:
    return " ".join(f"{100 * a:.2f}" for a in (accuracy if isinstance(accuracy, list) else [accuracy]))


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole records up to ``step``: those after it will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= step and record["event"] != "kept":  # which is told again at the end
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break  # the line the run was killed in
    write_atomically(path, "".join(kept).encode())


def tensorboard_writer() -> Callable[[Path | None, int], Any]:
    """What makes a writer for a folder and the step to start from. Raises InputError where the extra is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs its extra: pip install 'fastensdistill[tensorboard]'") from None
    return lambda folder, step: SummaryWriter(f"{folder}/tensorboard", purge_step=step + 1 if step else None)

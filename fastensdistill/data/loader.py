"""The whole split on the device as uint8; shuffling, augmentation and cast are batched tensor code there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fastensdistill.data.augment import Augment, augment_images, draw, make_tables, to_float
from fastensdistill.data.mixing import Mixing
from fastensdistill.data.sources import Split
from fastensdistill.errors import InputError


class EvaluationSet:
    """A split on the device, read in order and without augmentation.

    ``images`` is uint8 ``(N, C, H, W)``, stored channels_last; ``labels`` is int64 ``(N,)``.
    """

    def __init__(self, split: Split, device: torch.device | str, *, dtype: torch.dtype = torch.float32) -> None:
        """``dtype`` is the floating type of the batches. Raises ``InputError`` for images that are not uint8 NHWC."""
        self.images, self.labels = to_device(split, torch.device(device))
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Memory of the set on the device, in bytes."""
        return self.images.nbytes + self.labels.nbytes

    def part(self, index: Tensor) -> EvaluationSet:
        """The images at ``index`` (n,), a copy."""
        part = object.__new__(EvaluationSet)
        part.images, part.labels, part.dtype = self.images[index], self.labels[index], self.dtype
        return part

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Images ``(B, C, H, W)`` in [0, 1], channels_last, in the order of ``labels``; the last batch may be smaller.

        A batch size beyond the set gives one batch. Raises ``InputError`` for a batch size below 1.
        """
        check_batch_size(batch_size)
        return (
            to_float(self.images[start : start + batch_size].permute(0, 2, 3, 1), self.dtype)
            for start in range(0, len(self), batch_size)
        )


class DeviceLoader:
    """Endless shuffled training batches from a split that lives on the device.

    Each epoch is a new permutation; its last incomplete batch is dropped. All randomness comes from ``generator``,
    drawn in this order: the permutation when an epoch starts, then per batch what ``augment.draw`` draws, and how
    images are mixed, which they are within a process's share.

    ``share`` (rank, count) is one of ``count`` processes: with equal seeds all of them draw the same batches, and each
    hands out its own ``batch_size / count`` images of every batch.
    A captured step calls the halves of :meth:`next` itself: :meth:`advance` on the host, :meth:`read` in the graph.
    """

    def __init__(
        self,
        split: Split | EvaluationSet,
        batch_size: int,
        *,
        device: torch.device | str,
        generator: torch.Generator,
        augment: Augment | None = None,
        dtype: torch.dtype = torch.float32,
        share: tuple[int, int] = (0, 1),
        classes: int | None = None,
    ) -> None:
        """``augment=None`` leaves the images as they are; ``dtype`` is the floating type of the batches; ``classes``
        counts the data's, where images are mixed.

        Given an ``EvaluationSet`` on ``device``, the loader reads that memory: several loaders, one copy.
        Raises ``InputError`` for a batch below 1 or larger than the set, or that ``share`` does not divide, an
        augmentation that does not fit the images, images that are not uint8 NHWC, and a generator on another device.
        """
        check_batch_size(batch_size)
        rank, count = share
        if batch_size % count:
            raise InputError(f"batch size is {batch_size}; expected a multiple of the {count} processes")
        if batch_size > len(split.labels):
            raise InputError(f"batch size is {batch_size}; expected at most the {len(split.labels)} training images")
        self.augment = augment if augment is not None else Augment(pad=0, flip=False)
        if isinstance(split, EvaluationSet):
            self.images, self.labels = split.images, split.labels
            if self.images.device.type != torch.device(device).type:
                raise InputError(f"the set is on {self.images.device}; expected it on {device}")
        else:
            self.images, self.labels = to_device(split, torch.device(device))
        size = self.images.shape[2], self.images.shape[3]
        self.augment.check(size, self.images.shape[1])
        self._tables = make_tables(self.augment, size, self.images.device)
        if generator.device.type != self.images.device.type:
            raise InputError(f"the generator is on {generator.device}; expected it on {self.images.device}")
        self.batch_size, self.generator, self.dtype = batch_size, generator, dtype
        self._permutation = torch.arange(len(self.labels), device=self.images.device)
        self._position = self.batches_per_epoch  # used up: the first batch draws the first permutation
        own = batch_size // count
        self._own = slice(rank * own, (rank + 1) * own)
        self.mixing: Mixing | None = None
        if self.augment.mixes:
            if own < 2:
                raise InputError(f"batch size is {batch_size} for {count} processes; expected at least {2 * count} for "
                                 "mixup and cutmix, which blend images of a process's share")  # fmt: skip
            self.mixing = Mixing(self.augment.mixup, self.augment.cutmix, classes, self.images.device, dtype)
        self._index = self._permutation[:own].clone()  # of the images to read; it never moves, for captured reads

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return len(self.labels) // self.batch_size

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """(B, C, H, W) of the images that one call of :meth:`next` hands out."""
        return len(self._index), *self.images.shape[1:]

    @property
    def nbytes(self) -> int:
        """Memory of the set and of the augmentation's tables on the device, in bytes."""
        return self.images.nbytes + self.labels.nbytes + self._tables.nbytes

    def next(self) -> tuple[Tensor, Tensor]:
        """Images ``(B, C, H, W)`` in [0, 1], channels_last, and labels: int64 ``(B,)``, of mixed images probabilities
        ``(B, classes)``. Starts a new epoch by itself."""
        self.advance()
        return self.read()

    def advance(self) -> None:
        """Choose the next batch's images. Nothing waits for the device."""
        if self._position == self.batches_per_epoch:
            self._permutation = torch.randperm(len(self.labels), generator=self.generator, device=self.images.device)
            self._position = 0
        start = self._position * self.batch_size
        self._index.copy_(self._permutation[start + self._own.start : start + self._own.stop])
        self._position += 1

    def read(self) -> tuple[Tensor, Tensor]:
        """The batch that was chosen, as :meth:`next` returns it, with draws of its own: work for the device alone."""
        draws = draw(self.batch_size, self.augment, self.generator).of(self._own)
        images = augment_images(self.images, self._index, draws, self.augment, self._tables, self.dtype)
        labels = self.labels[self._index]
        if self.mixing is None:
            return images, labels
        mixes = self.mixing.draw(self.batch_size, self.generator)
        return self.mixing(images, labels, mixes.of(self._own))

    def meta_batch(self) -> tuple[Tensor, Tensor]:
        """What :meth:`read` returns, on the meta device: shapes, dtypes and the order in memory."""
        images = torch.empty(self.batch_shape, dtype=self.dtype, device="meta", memory_format=torch.channels_last)
        if self.mixing is not None:
            return images, images.new_empty(len(images), self.mixing.classes)
        return images, torch.empty(len(images), dtype=torch.int64, device="meta")

    def state_dict(self) -> dict[str, Tensor | int]:
        """What continues the sequence bit for bit, also within an epoch: CPU tensors and whole numbers.

        ``position`` counts the batches of this epoch that were handed out; ``permutation`` is int64 ``(N,)``;
        ``generator`` is the generator's state, uint8; ``batch_size`` is there to be compared.
        """
        return {
            "position": self._position,
            "batch_size": self.batch_size,
            "permutation": self._permutation.cpu().clone(),
            "generator": self.generator.get_state().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Continue where ``state_dict`` was taken. Sets the generator too.

        Raises ``InputError``, with nothing changed, for a state of another set size or batch size, or with entries
        missing or damaged.
        """
        missing = {"position", "batch_size", "permutation", "generator"} - set(state)
        if missing:
            raise InputError(f"the loader's state lacks {', '.join(sorted(missing))}")
        position, batch_size = int(state["position"]), int(state["batch_size"])
        permutation, generator = torch.as_tensor(state["permutation"]), torch.as_tensor(state["generator"])
        if batch_size != self.batch_size:
            raise InputError(f"the loader's state has batch size {batch_size}; expected {self.batch_size}")
        if permutation.shape != (len(self.labels),):
            raise InputError(f"the loader's state is of {permutation.numel()} images; expected {len(self.labels)}")
        if not torch.equal(permutation.cpu().sort().values, torch.arange(len(self.labels))):
            raise InputError(f"the loader's state holds no permutation of 0..{len(self.labels) - 1}")
        if not 0 <= position <= self.batches_per_epoch:
            raise InputError(f"the loader's state has position {position}; expected 0 to {self.batches_per_epoch}")
        try:
            self.generator.set_state(generator.cpu())
        except (RuntimeError, TypeError) as error:
            kind = self.generator.device.type
            raise InputError(f"the loader's state holds no state of a {kind} generator") from error
        self._permutation = permutation.to(self.images.device, copy=True)
        self._position = position


def check_batch_size(batch_size: int) -> None:
    """Raise ``InputError`` unless ``batch_size`` is a whole number of at least 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise InputError(f"batch size is {batch_size!r}; expected a whole number of at least 1")


def to_device(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images uint8 ``(N, C, H, W)``, stored channels_last as the split has them, and labels int64, on the device."""
    images, labels = split.images, split.labels
    if images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(f"images are {images.dtype} {images.shape}; expected uint8 (N, H, W, C)")
    if labels.shape != (len(images),):
        raise InputError(f"labels have shape {labels.shape}; expected ({len(images)},), one per image")
    pixels = torch.tensor(np.ascontiguousarray(images), device=device)
    return pixels.permute(0, 3, 1, 2), torch.tensor(np.asarray(labels, dtype=np.int64), device=device)

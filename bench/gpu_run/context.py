"""What a stage is given: where its results go, how large everything is, and what is rehearsed or planted."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.gpu_run.record import Record
from bench.setting import Setting

# Every mask is needed: 4 and 8 channels, and counts of images that no block divides
ODD, ODD_REHEARSED = Setting("tiny", "tdiv-sdiv", 5, 3), Setting("tiny", "tdiv-sdiv", 3, 2)

TIERS = Setting("mobilenet_v2-32", "tdiv-sdiv", 128, 2)  # a network of depthwise convolutions


@dataclass(frozen=True)
class Sizes:
    """Networks and batches. ``small`` is the batch of the proofs."""

    network: str = "wrn28_4"
    other: str = "resnet32"
    members: int = 4
    batches: tuple[int, ...] = (512, 128)
    small: int = 8
    odd: Setting = ODD
    tiny: int = 5  # images of the tiny step
    rounds: int = 15
    turn: float = 0.2  # seconds of one contender's turn in a round
    tiers: Setting = TIERS


REHEARSED = Sizes("tiny", "tiny-resnet", 2, (4, 3), 2, ODD_REHEARSED, 3, 2, 0.0, ODD_REHEARSED)


@dataclass(frozen=True)
class Context:
    """``out`` is the folder of the results. In a rehearsal the device is the CPU, the sizes are tiny, and what only a
    GPU does has a stand-in. ``plants`` are the faults planted in it (``faults.py``)."""

    out: Path
    record: Record
    rehearse: bool = False
    plants: tuple[str, ...] = ()
    seconds: float = 600.0  # what the stage may take
    sizes: Sizes = field(default_factory=Sizes)
    began: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        """Of ``time.monotonic``: nothing further is begun after it, so that the stage ends by itself."""
        return self.began + 0.85 * self.seconds

    @property
    def passed(self) -> float:
        """The share of its time that the stage has used."""
        return (time.monotonic() - self.began) / self.seconds

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and packed weights. Triton's interpreter multiplies float32 only."""
        return torch.float32 if self.rehearse else torch.bfloat16

    def setting(self, batch: int, network: str = "", method: str = "tdiv-sdiv") -> Setting:
        return Setting(network or self.sizes.network, method, batch, self.sizes.members)

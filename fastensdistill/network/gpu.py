"""What a GPU can do at best: the roof that the least time of a launch is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from fastensdistill.network.launch import Launch


@dataclass(frozen=True)
class Gpu:
    """``flops`` per second in bf16 with float32 accumulation, dense; ``bandwidth`` of its memory, bytes per second."""

    name: str
    flops: float
    bandwidth: float
    source: str

    def least_time(self, launch: Launch) -> float:
        """Seconds: the larger of the time for the arithmetic and the time for the traffic."""
        return max(launch.flops / self.flops, launch.nbytes / self.bandwidth)


GPUS = {
    # 989 TFLOP/s and 4.8 TB/s on the datasheet; these are what large matrix products and copies are expected to hold
    "h200": Gpu("H200", 790e12, 4.3e12, "expected to be held"),
    "h100": Gpu("H100 SXM", 989e12, 3.35e12, "datasheet"),
    "a100": Gpu("A100 SXM 80 GB", 312e12, 2.04e12, "datasheet"),
    "b200": Gpu("B200", 2250e12, 8.0e12, "datasheet"),
}

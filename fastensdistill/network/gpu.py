"""What a GPU can do at best: the roof that the least time of a launch is measured against.

The rates of the H100 and the H200 are what cards of these kinds were measured to hold in a large bf16 matrix product
and in a large copy, bytes read and written together; the H200's are rounded. Their datasheets say 989 TFLOP/s for both,
and 3.35 and 4.8 TB/s. The rates of the A100 and the B200 are their datasheets'.
``bench.roof`` measures the card at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastensdistill.network.launch import Launch

# What is assumed of every node of a captured graph, and has not been measured
HELD = 0.85  # of the memory's rate, by kernels that do little else
LEAST = 1.5e-6  # seconds: a kernel that does next to nothing starts, waits for memory twice, stores
GAP = 1.2e-6  # seconds between two nodes, each depending on the one before


@dataclass(frozen=True)
class Gpu:
    """``flops`` per second in bf16 with float32 accumulation, dense; ``bandwidth`` of its memory, bytes per second.

    ``arch`` is the compute capability as one number; ``multiprocessors`` says how many programs keep it busy.
    """

    name: str
    flops: float
    bandwidth: float
    source: str
    arch: int = 90
    multiprocessors: int = 132

    def least_time(self, launch: Launch) -> float:
        """Seconds: the larger of the time for the arithmetic and the time for the traffic."""
        return max(launch.flops / self.flops, launch.nbytes / self.bandwidth)

    def node_time(self, flops: float, nbytes: float, programs: float) -> float:
        """Seconds that a node of so many programs should take, with the gap to the next: a prediction.

        Fewer programs than multiprocessors have that share of either rate; no node is shorter than ``LEAST``.
        """
        share = min(1.0, programs / self.multiprocessors)
        return max(flops / (share * self.flops), nbytes / (share * HELD * self.bandwidth), LEAST) + GAP


GPUS = {
    "h200": Gpu("H200", 790e12, 4.3e12, "measured: a large matrix product, a copy"),
    "h100": Gpu("H100 SXM", 798e12, 3.0e12, "measured: a large matrix product, a copy"),
    "a100": Gpu("A100 SXM 80 GB", 312e12, 2.04e12, "datasheet", 80, 108),
    "b200": Gpu("B200", 2250e12, 8.0e12, "datasheet", 100, 148),
}


def gpu_named(device: str) -> Gpu | None:
    """The GPU of a ``device`` as its driver names it; None for others.

    >>> [gpu_named(name) for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB")] == [GPUS["a100"], None]
    True
    """
    words = device.lower().replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)

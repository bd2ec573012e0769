"""What the device holds in practice: a large copy and a large bf16 matrix product, on random data.

    python -m bench.roof

The least time of a plan (``fastensdistill.network.gpu``) taken with these two numbers is the roof of every other
measurement of the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.common import arguments, describe_host, interleave, save, spread, start, synchronize
from fastensdistill.network.gpu import Gpu


def measure(device: torch.device, *, smoke: bool = False, rounds: int = 15) -> tuple[Gpu, dict[str, Any]]:
    """The device as measured now, and the measurement. On a CPU the product is in float32."""
    cuda = device.type == "cuda"
    n, size = (64, 1 << 16) if smoke else (8192, 1 << 31) if cuda else (1024, 1 << 27)
    dtype = torch.bfloat16 if cuda else torch.float32
    # Zeros would be multiplied with less power, so at higher clocks, than any real data.
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target, product = torch.empty_like(source), torch.empty_like(a)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=product)}
    times = interleave(calls, rounds, device, least=0.05 if cuda else 0.0)
    synchronize(device)
    # the matrix product's product, and the copy's copy: neither may be a number about something else
    exact = a[:4].double() @ b.double()
    worst = float((product[:4].double() - exact).norm() / exact.norm())
    if worst > 1e-2 or not torch.equal(source, target):
        raise RuntimeError(f"the roof's own product errs by {worst:.1e}")
    flops, nbytes = 2 * n**3, 2 * size
    copy, multiply = spread(times["copy"]), spread(times["product"])
    rate, bandwidth = flops / multiply["median"], nbytes / copy["median"]
    found = {
        "flops_per_second": rate, "bytes_per_second": bandwidth,
        "dtype": str(dtype).removeprefix("torch."), "matrix": n, "copied_bytes": size,
        "seconds": {"copy": copy, "product": multiply},
    }  # fmt: skip
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    return Gpu(name, rate, bandwidth, "measured"), found


def main(argv: Sequence[str] | None = None) -> int:
    options = start(arguments(__doc__, rounds=15), argv)
    device = torch.device(options.device)
    gpu, found = measure(device, smoke=options.smoke, rounds=options.rounds)
    print(f"{gpu.name}: {gpu.flops / 1e12:.3g} TFLOP/s in {found['dtype']}, {gpu.bandwidth / 1e12:.3g} TB/s copied")
    save(options.json, "roof", describe_host(device), options.smoke, roof=found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

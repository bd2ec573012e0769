"""Time of distillation_loss with its gradient, the op against its reference, on the CPU or a GPU.

    python -m bench.loss [--device cuda] [--threads 2]

Both are timed in turn within one run, median with p20 and p80 of many repeats, and only after they agree. The last
line gives the time of a call whose work is nothing: what the dispatcher, the stable ABI's boxing and the outputs cost.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fastensdistill.kernels import extension
from fastensdistill.kernels.distillation_loss import LossTerms, distillation_loss, distillation_loss_reference

# teachers, branches, images, classes
SHAPES = [(4, 4, 128, 10), (4, 4, 128, 100), (4, 4, 128, 200), (4, 4, 128, 1000), (2, 2, 32, 21841)]
REPEATS = 60


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(times: list[float]) -> str:
    low, *_, high = statistics.quantiles(times, n=5)
    return f"{1e6 * statistics.median(times):8.0f} ({1e6 * low:.0f}–{1e6 * high:.0f})"


def compare(shape: tuple[int, int, int, int], alpha: float, device: str) -> str:
    M, K, B, C = shape
    torch.manual_seed(0)
    teacher, branch = 3 * torch.randn(M, B, C, device=device), 3 * torch.randn(K, B, C, device=device)
    labels = torch.randint(0, C, (B,), device=device)

    def op():
        return distillation_loss(teacher, branch, labels, 4.0, alpha)

    def reference():
        return distillation_loss_reference(teacher, branch, labels, LossTerms(4.0, alpha, False))

    for name, a, e in zip(("loss", "kd", "ce", "gradient"), op(), reference(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-7, msg=f"{name}: {{}}".format)
    times: dict[str, list[float]] = {"op": [], "reference": []}
    for _ in range(REPEATS):
        times["op"].append(timed(op, device))
        times["reference"].append(timed(reference, device))
    ratio = statistics.median(times["reference"]) / statistics.median(times["op"])
    return f"{shape!s:>20} {alpha:5.1f} {spread(times['op']):>22} {spread(times['reference']):>24} {ratio:6.2f}"


def overhead(device: str) -> str:
    one = torch.randn(1, 1, 2, device=device)
    label = torch.zeros(1, dtype=torch.int64, device=device)
    op, terms = torch.ops.fastensdistill.distillation_loss, LossTerms(4.0, 1.0, False)
    calls = 2000
    seconds = timed(lambda: [op(one, one, label, *terms) for _ in range(calls)], device) / calls
    return f"one call of distillation_loss on 1 x 1 x 2 logits, three operands and four outputs: {1e6 * seconds:.1f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    state = extension.describe()
    print(
        f"torch {state['torch']}, {arguments.device}, {arguments.threads} threads, extension loaded: {state['loaded']}"
    )
    print(f"{'M, K, B, C':>20} {'alpha':>5} {'op us':>22} {'reference us':>24} {'ratio':>6}")
    for shape in SHAPES:
        for alpha in (1.0, 0.9):
            print(compare(shape, alpha, arguments.device))
    print(overhead(arguments.device))


if __name__ == "__main__":
    main()

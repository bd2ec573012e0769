"""Which networks run how fast an engine: the tier of each as a teacher and as a student, and whether it computes right.

    python -m bench.networks [NAME …] [--json FILE] [--tiers-only] [--in-process]

Every network of the list below takes one step in float64 as the two teachers of a small student, and one as a student
of two small teachers, on the fused and on the reference engine (``bench.network_steps``). Each network has a process
of its own: what it needs of memory is gone afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.common import ROOT, describe_host, save, table

RESULTS = ROOT / "bench" / "results" / "networks.json"
CLASSES = 10
BOUND = 1e-9


@dataclass(frozen=True)
class Listed:
    """A network by its name in ``source``, the ``size`` of its images, and more ``arguments`` of its constructor.

    ``tiers`` are what it is to get as a teacher and as a student; the driver fails where it gets others, and where an
    error of a step is not below ``bound``. ``spread`` is how far BatchNorm's statistics are moved off those of images:
    less where a network enlarges rounding errors.
    """

    source: str
    size: int = 64
    arguments: tuple[tuple[str, Any], ...] = ()
    tiers: tuple[str, str] = ("planned", "planned")
    spread: float = 1.0
    bound: float = BOUND

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return 3, self.size, self.size


def torchvision(size: int = 64, tiers: tuple[str, str] = ("planned", "planned"), **arguments: Any) -> Listed:
    return Listed("torchvision", size, tuple(arguments.items()), tiers)


def timm(
    size: int = 64, tiers: tuple[str, str] = ("planned", "planned"), spread: float = 1.0, bound: float = BOUND,
    **arguments: Any,
) -> Listed:  # fmt: skip
    return Listed("timm", size, tuple(arguments.items()), tiers, spread, bound)


# At 64x64 most have 2x2 positions left before their last pooling; transformers get patches of 8x8 there
PATCHES: dict[str, Any] = {"img_size": 64, "patch_size": 8}
NETWORKS: dict[str, Listed] = {
    "resnet18": torchvision(),
    "resnet50": torchvision(),
    "resnext50_32x4d": torchvision(),
    "wide_resnet50_2": torchvision(),
    "vgg11_bn": torchvision(),
    "vgg16": torchvision(),
    "densenet121": torchvision(),
    "mobilenet_v2": torchvision(),
    "mobilenet_v3_small": torchvision(),
    "efficientnet_b0": torchvision(),
    "shufflenet_v2_x1_0": torchvision(),
    "squeezenet1_1": torchvision(),
    "mnasnet1_0": torchvision(),
    "regnet_y_400mf": torchvision(),
    "convnext_tiny": torchvision(),
    "googlenet": torchvision(aux_logits=False, init_weights=False),
    "resnet26d": timm(),
    "resnetv2_50": timm(),
    "seresnet50": timm(),
    "ecaresnet26t": timm(),
    "res2net50_26w_4s": timm(),
    "skresnet18": timm(),
    "cspresnet50": timm(),
    "darknet53": timm(),
    "dla34": timm(),
    "hrnet_w18_small": timm(),
    "vovnet39a": timm(),
    "ghostnet_100": timm(),
    "mixnet_s": timm(),
    "tinynet_a": timm(),
    "mobilenetv4_conv_small": timm(),
    # Teachers of random weights make 5e-9 of rounding errors alone: so far apart are PyTorch's own two orders of a step
    "efficientnetv2_rw_t": timm(spread=0.1, bound=1e-7),
    "repvgg_a0": timm(),
    "convnextv2_atto": timm(),
    "convmixer_768_32": timm(32),
    "nfnet_f0": timm(tiers=("planned", "captured")),  # computes with a layer's own weight, which branches change
    "edgenext_x_small": timm(),
    "fastvit_t8": timm(),
    "vit_tiny_patch16_224": timm(**PATCHES),
    "deit_tiny_patch16_224": timm(**PATCHES),
    "mixer_s16_224": timm(img_size=64),  # of 16x16, whatever it is given
}


def build(name: str) -> nn.Module:
    """The network ``name`` of the list, with new weights."""
    listed = NETWORKS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if listed.source == "timm":
            from timm import create_model

            return create_model(name, pretrained=False, num_classes=CLASSES, **dict(listed.arguments))
        from torchvision.models import get_model

        return get_model(name, weights=None, num_classes=CLASSES, **dict(listed.arguments))


def one(name: str, tiers_only: bool) -> dict[str, Any]:
    """Everything about one network; ``error`` where that broke."""
    from bench.network_steps import ROLES, described, step_errors

    began = time.perf_counter()
    row: dict[str, Any] = {"name": name, "source": NETWORKS[name].source, "size": NETWORKS[name].size}
    try:
        row |= described(name, reads=not tiers_only)
        for role in () if tiers_only else ROLES:
            if row[role]["tier"] in ("planned", "mixed"):
                row[role] |= step_errors(name, role)
    except Exception as error:  # of other people's networks
        row["error"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def in_its_process(name: str, tiers_only: bool) -> dict[str, Any]:
    """As :func:`one`, by a new process."""
    command = [sys.executable, "-m", "bench.networks", name, "--in-process", *(["--tiers-only"] * tiers_only)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    lines = done.stdout.decode().splitlines()
    found = [line.removeprefix("row ") for line in lines if line.startswith("row ")]
    if found:
        return json.loads(found[-1])
    return {"name": name, "error": f"its process ended with status {done.returncode}"}


def worst(row: dict[str, Any], role: str) -> float | None:
    """The largest error of a step in that role."""
    errors = row.get(role, {}).get("errors")
    return max(errors.values()) if errors else None


def line(row: dict[str, Any]) -> dict[str, Any]:
    """What is printed of a network."""
    found: dict[str, Any] = {"name": row["name"], "seconds": row.get("seconds")}
    for role in ("teacher", "student"):
        found |= {role: row.get(role, {}).get("tier", "?"), f"{role} error": worst(row, role)}
    share = row.get("share")
    why = next((w for role in ("student", "teacher") if (w := row.get(role, {}).get("why"))), "")
    return found | {"share": None if share is None else f"{share:.0%}", "why": row.get("error", why)}


COLUMNS = {
    "name": "network", "teacher": "as teacher", "teacher error": "error", "student": "as student",
    "student error": "error", "share": "on our kernels", "seconds": "s", "why": "",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NETWORKS)}; all unless given")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--tiers-only", action="store_true", help="no steps: traces and plans alone")
    parser.add_argument("--in-process", action="store_true", help="no process for each network")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in NETWORKS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected names of the list, {', '.join(NETWORKS)}")
    run, rows, host = one if options.in_process else in_its_process, [], describe_host(torch.device("cpu"))
    for name in options.names or NETWORKS:
        rows.append(run(name, options.tiers_only))
        print("row " + json.dumps(rows[-1]) if options.in_process else said(rows[-1]), flush=True)
        save(options.json, "networks", host, options.tiers_only, bound=BOUND, rows=rows)
    if not options.in_process:
        print("\n" + table([line(row) for row in rows], COLUMNS))
    wrong = [row["name"] for row in rows if "error" in row]
    roles = [(row, role, NETWORKS[row["name"]].bound) for row in rows for role in ("teacher", "student")]
    wrong += [row["name"] for row, role, bound in roles if not (worst(row, role) or 0) < bound]
    wrong += [row["name"] for row in rows if tiers(row) != NETWORKS[row["name"]].tiers]
    return 1 if wrong else 0


def tiers(row: dict[str, Any]) -> tuple[str, str]:
    """What a network got, as a teacher and as a student."""
    return row.get("teacher", {}).get("tier", ""), row.get("student", {}).get("tier", "")


def said(row: dict[str, Any]) -> str:
    """A network's line while others are still to come."""
    return "  ".join(f"{key} {value:.1e}" if isinstance(value, float) and "error" in key else str(value)
                     for key, value in line(row).items() if value not in (None, ""))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

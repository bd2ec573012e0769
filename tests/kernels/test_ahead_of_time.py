"""Kernels compiled for sm_90 without a GPU: no spills, wgmma in every convolution, shared memory within the limit.

In processes of their own: a kernel that this process interprets cannot be compiled.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import kernel_report
from bench.kernel_report import SHARED_LIMIT, failures, occupancy
from fastensdistill.kernels.tiles import assume_arch, conv_tile, weight_gradient_split, weight_gradient_tile

REPORT = Path(kernel_report.__file__).parent / "results" / "kernel_report.json"


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=clean | environment, capture_output=True, text=True, timeout=600
    )


def test_report_of_a_small_network(tmp_path):
    file = tmp_path / "report.json"
    done = _python("-m", "bench.kernel_report", "--networks", "sample", "--batch", "8", "--json", str(file), "--every",
                   "7", "--only", "triton")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    kernels = {row["kernel"] for row in rows}
    assert {"grouped_conv_kernel", "conv_data_gradient_kernel", "conv_weight_gradient_kernel"} <= kernels
    wide = [row for row in rows if "64→128" in row["launch"] and row["HGMMA"]]
    assert {row["A from"] for row in wide} == {"shared memory"}
    assert all(not row["fails"] and row["registers"] > 0 and row["occupancy"] > 0 for row in rows)


def test_committed_report():
    """Every kernel of every network: none fails, and on sm_90 two data gradients fit a multiprocessor at least."""
    rows = json.loads(REPORT.read_text())["rows"]
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert [row["launch"] for row in rows if row["fails"] or row["spills"]] == []
    of_nodes = {f"{name}{way}_kernel" for name in ("activation", "gate", "layer_norm") for way in ("", "_gradient")}
    of_nodes |= {f"depthwise_{part}_kernel" for part in ("conv", "data_gradient", "weight_gradient")}
    for kernel in of_nodes:
        assert {row["arch"] for row in rows if row["kernel"] == kernel} == {80, 90, 100}, kernel
    wgmma = [row for row in rows if row["launch"].startswith("wgmma_")]
    assert {row["kernel"].split("<")[1] for row in wgmma} >= {"WideConv", "NarrowConv", "WgmmaWeightGradient"}
    assert all(row["HGMMA"] and row["TMA"] and not row["stack"] for row in wgmma)
    gradients = [row for row in rows if row["arch"] == 90 and row["kernel"] == "conv_data_gradient_kernel"]
    assert any("mean" in row["launch"] and "256→256" in row["launch"] for row in gradients)
    assert [row["launch"] for row in gradients if row["occupancy"] < 2] == []


PARAMETERS = """
import json
import torch
from bench.kernel_report import compile_launch
from fastensdistill.kernels import branch_rows, launch, layout, pack, sgd, unfold

K, table = 4, layout.Layout.build([("conv", (70, 41, 3, 3), True)], plain=6, slots=4)
flat, factors = torch.empty(table.size), torch.empty(K, table.factors)
with launch.record_launches() as launches:
    for dtype in (torch.bfloat16, torch.float32):
        packed = torch.empty(2, table.packed_size, dtype=dtype)
        pack.pack_weights(flat, factors, table, *packed)
        pack.pack_weights(flat.repeat(K), None, table, *packed)
    memory = table.gradients(K, {"conv": layout.Partials(9)})
    gradients = torch.empty(memory.size)
    unfold.unfold_gradients(gradients, memory, flat, factors, table, flat.clone())
    unfold.unfold_gradients(gradients, memory, flat.repeat(K), None, table, flat.repeat(K))
    sgd.sgd(flat, flat.clone(), flat.clone(), torch.tensor(0.1), momentum=0.9, weight_decay=5e-4)
    norm = [torch.empty(3) for _ in range(3)]
    rows = torch.zeros(5, 300, dtype=torch.int64)
    branch_rows.branch_rows(torch.empty(300), rows, flat, factors, *norm, table.ranked)
    table = layout.Layout.build([("conv", (70, 1, 5, 5), True)], slots=4, channel_groups={"conv": 70})
    flat, factors = torch.empty(table.size), torch.empty(K, table.factors)
    pack.pack_weights(flat, factors, table, *torch.empty(2, table.packed_size, dtype=torch.bfloat16))
    memory = table.gradients(K)
    unfold.unfold_gradients(torch.empty(memory.size), memory, flat, factors, table, flat.clone())
    del launches[-1]  # of the factors, as above
chosen = {80: launches[2::4], 90: launches, 100: launches[2::4]}
print(json.dumps([compile_launch(launch, arch) for arch in chosen for launch in chosen[arch]]))
"""


def test_kernels_over_all_parameters():
    """Packing, un-folding, SGD and rows: a handful of registers, so that many programs hide their reads."""
    done = _python("-c", PARAMETERS)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 3 + 11 + 3
    assert {row["arch"] for row in rows} == {80, 90, 100}
    for row in rows:
        assert failures(row, 0) == [], row
        assert row["registers"] <= 128, row
        assert row["occupancy"] * row["warps"] >= 16, row


UPDATES = """
import json
import torch
from bench.kernel_report import compile_launch
from fastensdistill.kernels import adamw, clip_factors, launch, move_average, sgd, update

flat, one = torch.empty(6000), torch.zeros(1)
average = update.Average(flat, one[0], 0.9)
with launch.record_launches() as launches:
    for runs in ([(0, 4000), (4004, 1200)], [(0, 4000), (4001, 1200)]):  # by 16 bytes, and by 4
        given = {"average": average, "clip": one, "runs": update.fields_of(update.Run(*run) for run in runs)}
        adamw.adamw(flat, flat, flat, flat, one[0], one, beta1=0.9, beta2=0.999, weight_decay=0.1, **given)
        sgd.sgd(flat, flat, flat, one[0], momentum=0.9, weight_decay=0.1, **given)
    clip_factors.clip_factors(flat, most=1.0)
    move_average.move_average(flat, flat, one[0], 0.9)
chosen = {80: launches[:1], 90: launches, 100: launches[:1]}
print(json.dumps([compile_launch(launch, arch) for arch in chosen for launch in chosen[arch]]))
"""


def test_kernels_of_the_update():
    """With a table of runs and all that they can do, without spills; by 16 bytes where runs begin at such."""
    done = _python("-c", UPDATES)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)
    names = ["adamw_kernel", "sgd_kernel", "adamw_kernel", "sgd_kernel"]
    last = ["squares_kernel", "clip_factors_kernel", "move_average_kernel"]
    assert [row["kernel"] for row in rows] == ["adamw_kernel", *names, *last, "adamw_kernel"]
    for row in rows:
        assert failures(row, 0) == [], row
        assert row["registers"] <= 128, row
    wide = [row["16-byte loads"] for row in rows if row["arch"] == 90]
    assert wide[:2] == [10, 8]
    assert wide[2:4] == [0, 0]
    assert min(wide[4], wide[6]) > 0


OF_OTHER_NODES = """
import json
import torch
from bench import depthwise, elementwise
from bench.kernel_report import compile_launch
from fastensdistill.kernels import launch, tiles

place = torch.device("cpu"), torch.bfloat16
with tiles.assume_arch(90), launch.record_launches() as launches:
    for case in (*depthwise.of_layer("", 3, 1, (2, 16, 8, 8, 64), *place), *elementwise.cases(*place, 1, 1)):
        case.run()
longest = {one.kernel.__name__: one for one in launches}  # the data gradient with everything behind it
names = [name for name in longest if name.startswith("depthwise") or name.endswith("gradient_kernel")]
print(json.dumps([compile_launch(longest[name], 90) for name in names]))
"""


def test_kernels_of_other_nodes():
    """Depthwise convolutions, which load 8 channels at once, and gradients of activations, gates and LayerNorms."""
    done = _python("-c", OF_OTHER_NODES)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["kernel"]: row for row in json.loads(done.stdout)}
    of_depthwise = {f"depthwise_{part}_kernel" for part in ("conv", "data_gradient", "weight_gradient")}
    assert set(rows) == of_depthwise | {f"{name}_gradient_kernel" for name in ("activation", "gate", "layer_norm")}
    for row in rows.values():
        assert failures(row, 0) == [], row
        assert row["occupancy"] >= 2, row
    assert all(rows[name]["16-byte loads"] > 0 for name in of_depthwise if "weight" not in name)
    assert "mean" in rows["depthwise_data_gradient_kernel"]["launch"]


def test_failures_are_seen():
    good = {"spills": 0, "shared": 1000, "arch": 90, "HGMMA": 4, "occupancy": 3, "planned": 3}
    assert failures(good, 64) == []
    assert failures(good | {"spills": 3}, 64) == ["3 spill instructions"]
    assert failures(good | {"HGMMA": 0}, 64) == ["no HGMMA"]
    assert failures(good | {"HGMMA": 0}, 16) == failures(good | {"HGMMA": 0, "arch": 80}, 64) == []
    assert len(failures(good | {"shared": 228 * 1024}, 64)) == 1
    assert failures(good | {"occupancy": 7, "planned": 8}, 64) == []
    assert failures(good | {"planned": 4}, 64) == ["3 programs a multiprocessor, the tile counts on 4"]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [(128, 73728, 4, 3), (255, 0, 8, 1), (32, 0, 4, 16), (168, 98304, 4, 2), (64, 0, 8, 4)],
)
def test_occupancy(registers, shared, warps, expected):
    assert occupancy(90, registers, shared, warps) == expected


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("itemsize", [2, 4], ids=["half", "float32"])
def test_every_channel_count_has_a_tile_that_fits(arch, itemsize):
    small = arch in (86, 89, 120)  # 99 KB of shared memory
    limit = 99 * 1024 if small else SHARED_LIMIT[min(arch, 100)][0] if arch in SHARED_LIMIT else 227 * 1024
    for channels in [1, 3, 10, *range(16, 700, 16), 1024, 2048]:
        for out in (16, 20, 64, 96, 160, 640):
            tile = conv_tile(arch, channels, out, itemsize)
            assert channels % tile.BLOCK_K == 0 or channels % 16, "a block of K must stay inside one tap"
            for t in (tile, *(weight_gradient_tile(arch, taps, channels, out, itemsize) for taps in (1, 9))):
                assert (t.BLOCK_M + t.BLOCK_N) * t.BLOCK_K * itemsize * t.num_stages <= limit
                assert all(size & (size - 1) == 0 for size in t[:4]), "Triton's blocks are powers of two"
                assert t.reason


# taps, channels, output channels, side of the map: WRN-28-4's layers, the stem, ResNet-32's narrow ones
WEIGHT_GRADIENTS = [
    (9, 3, 16, 32), (9, 16, 64, 32), (1, 16, 64, 32), (9, 64, 64, 32), (9, 64, 128, 16), (1, 64, 128, 16),
    (9, 128, 128, 16), (9, 128, 256, 8), (1, 128, 256, 8), (9, 256, 256, 8), (9, 16, 16, 32), (9, 32, 32, 16),
]  # fmt: skip


@pytest.mark.parametrize("layer", WEIGHT_GRADIENTS, ids=str)
@pytest.mark.parametrize("batch", [512, 128, 8])
def test_weight_gradients_fill_the_device(layer, batch):
    taps, channels, out_channels, side = layer
    for arch, multiprocessors in ((80, 108), (90, 132), (100, 148)):
        positions = batch * side**2
        tile, blocks, steps, splits = weight_gradient_split(arch, 4, positions, taps, channels, out_channels)
        total = -(-positions // tile.BLOCK_K)
        assert (splits - 1) * steps < total <= splits * steps, "every position once, and no program without any"
        assert steps >= min(8, total)
        waves = 4 * blocks * splits / (multiprocessors * tile.programs)
        if batch == 512:
            assert waves / math.ceil(waves) > 0.84, f"{waves} waves"
            assert splits * taps * channels * out_channels * 4 < positions * (channels + out_channels) * 2


OCCUPANCY = """
import json, sys
import torch
from bench.kernel_report import compile_launch
from fastensdistill.kernels import launch, tiles
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient

rows = []
for arch, every in ((80, 3), (90, 1), (100, 3)):
    for taps, channels, out, side in json.loads(sys.argv[1])[::every]:
        kernel, stem, H = int(taps**0.5), channels <= 4, side
        x = torch.empty(4, 16, H, H, channels, dtype=torch.float32 if stem else torch.bfloat16)
        prologue = {"in_scale": torch.empty(1, 3), "in_shift": torch.empty(1, 3)} if stem else {}
        d = torch.empty(4, 16, H, H, out, dtype=torch.bfloat16)
        with tiles.assume_arch(arch), launch.record_launches() as launches:
            conv_weight_gradient(x, d, kernel=kernel, padding=kernel // 2, **prologue)
        rows.append(compile_launch(launches[0], arch))
print(json.dumps(rows))
"""


def test_weight_gradients_hold_as_many_programs_as_their_tiles_say():
    layers = [(9, 3, 16, 32), (9, 16, 64, 32), (9, 64, 64, 32), (9, 64, 128, 16), (1, 64, 128, 16), (9, 32, 32, 16)]
    done = _python("-c", OCCUPANCY, json.dumps(layers))
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads(done.stdout):
        assert failures(row, 0) == [], row
        # a stem's registers depend on the compiler: 3 programs by Triton 3.6, 5 to 7 by 3.8
        assert row["occupancy"] <= row["planned"] + (4 if "in_scale" in row["launch"] else 1), row


def test_widths_of_wide_networks_waste_little():
    with assume_arch(90):
        assert [conv_tile(90, 64, out).BLOCK_N for out in (64, 128, 160, 320, 640)] == [64, 128, 64, 64, 128]


def test_choices_are_printed_once():
    code = "from fastensdistill.kernels.tiles import conv_tile\nfor _ in range(2):\n    conv_tile(90, 64, 128)\n"
    lines = _python("-c", code, FASTENSDISTILL_PRINT_TILES="1").stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tile conv sm_90 (64, 128, 2): (128, 128, 64, 8, 3)")
    assert not _python("-c", code).stderr


def test_interpreted_kernels_are_not_compiled(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["kernel_report", "--networks", "sample"])
    with pytest.raises(SystemExit) as error:
        kernel_report.main()
    assert error.value.code == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err

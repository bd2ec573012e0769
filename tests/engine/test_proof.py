"""Kernels that were never run are used only where another process has proven them; whatever it does, this one lives."""

from __future__ import annotations

import io
import sys
import time

import pytest
import torch

from fastensdistill.engine import dispatch, proof, select
from fastensdistill.engine.dispatch import PREDICTED, Choice, Dispatch
from fastensdistill.engine.proof import Outcome
from fastensdistill.engine.select import EngineChoice
from fastensdistill.errors import InputError
from fastensdistill.kernels import extension, prove, wgmma
from fastensdistill.kernels.conv_data_gradient import conv_data_gradient
from fastensdistill.kernels.conv_weight_gradient import conv_weight_gradient
from fastensdistill.kernels.grouped_conv import ConvOutput, grouped_conv
from fastensdistill.models.preresnet import PreResNet
from fastensdistill.network.plan import plan_step
from fastensdistill.network.trace import trace
from tests.untyped import untyped

CUDA = torch.device("cuda", 0)
PREDICTED_OPS = {row.op for row in PREDICTED}
OWN = {"library": "abc", "device": "H100", "driver": "1.2", "torch": "2.11"}
WRONG = "print('right  a'); print('WRONG  b: z[0] is 1, expected 2'); print('1 wrong'); raise SystemExit(1)"


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A GPU of compute capability 9.0 with an extension that has all kernels, as far as anybody asks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(proof.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(proof, "identity", lambda device: OWN)
    monkeypatch.setattr(wgmma, "kernel", lambda op: op)
    monkeypatch.setattr(extension, "serves", lambda name, device: True)
    proof._known.clear()
    yield CUDA
    proof._known.clear()
    wgmma.keep_copies(False)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import sys; assert sys.argv[1:] == ['--device', 'cuda:0']; print('all right')", ""),
        (WRONG, "exit status 1, 1 wrong"),
        ("print('right  a', flush=True); import os; os.kill(os.getpid(), 6)", "killed by SIGABRT, last: right  a"),
        ("print('right  a', flush=True); import time; time.sleep(60)", "not done after 1 s, last: right  a"),
        ("raise SystemExit(3)", "exit status 3, no output"),
    ],
    ids=["right", "wrong", "killed", "hangs", "silent"],
)
def test_whatever_the_other_process_does_comes_down_to_a_line(code, found):
    began, echo = time.monotonic(), io.StringIO()
    assert proof.prove(CUDA, command(code), 1 if "sleep" in code else 30, echo) == found
    assert time.monotonic() - began < 20
    assert ("right" in echo.getvalue()) == ("right" in code)
    assert proof.prove(CUDA, ["/no/such/python"]) == "/no/such/python could not be started: No such file or directory"


def test_where_there_is_no_folder_for_temporary_files_there_is_no_proof(monkeypatch):
    def none(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(proof.tempfile, "TemporaryFile", none)
    assert proof.prove(CUDA, command("")) == "nowhere to write to: No usable temporary directory found"


def test_the_command_is_the_one_of_the_kernels(monkeypatch, tmp_path):
    """It is found wherever this process was started."""
    assert proof.COMMAND[1:] == ("-m", prove.__name__)
    monkeypatch.chdir(tmp_path)
    echo = io.StringIO()
    assert proof.prove(CUDA, [*proof.COMMAND, "--help"], 60, echo) == ""
    assert "One line for each launch" in echo.getvalue()


@pytest.mark.parametrize(("code", "right"), [("print('all right')", True), (WRONG, False)])
def test_an_outcome_is_remembered_for_this_library_device_driver_and_version(
    monkeypatch, device, tmp_path, code, right
):
    mark = tmp_path / "runs"
    counted = f"import sys\nif '--copies' not in sys.argv: open({str(mark)!r}, 'a').write('x')\n{code}"
    monkeypatch.setattr(proof, "COMMAND", command(counted))
    for runs, own in ((1, OWN), (1, OWN), (2, OWN | {"driver": "1.3"}), (3, OWN | {"library": "abd"}), (3, OWN)):
        monkeypatch.setattr(proof, "identity", lambda device, own=own: own)
        proof._known.clear()
        assert (proof.trouble(device) is None) == right
        assert mark.read_text() == "x" * runs
    assert len(list((tmp_path / "fastensdistill").iterdir())) == 3
    assert proof.state(device) == ("proven" if right else f"not proven (exit status 1, 1 wrong; again: {proof.AGAIN})")
    if not right:
        assert proof.advice(device) == (
            "Triton computes the convolutions: the wgmma kernels were not proven on this device (exit status 1, 1 "
            "wrong; again: python -m fastensdistill.engine.proof)"
        )


@pytest.mark.parametrize("spoil", ["{", '{"of": {}, "trouble": ""}', '{"trouble": 1}', "[]"])
def test_a_file_that_says_nothing_about_this_device_is_no_proof(monkeypatch, device, spoil):
    proof.remember(OWN, Outcome("", True))
    assert proof.remembered(OWN) == Outcome("", True)
    proof.file_of(OWN).write_text(spoil)
    assert proof.remembered(OWN) is None
    monkeypatch.setattr(proof, "prove", lambda *_, **__: "no")
    assert proof.trouble(device) == "no"
    assert proof.remembered(OWN) == Outcome("no")


def test_where_the_first_layout_is_wrong_the_other_is_kept(monkeypatch, device):
    monkeypatch.setattr(proof, "COMMAND", command(f"import sys\nif '--copies' not in sys.argv: {WRONG}"))
    assert proof.trouble(device) is None
    assert wgmma.copies()
    assert proof.state(device) == "proven, with copies of tiles"
    wgmma.keep_copies(False)
    proof._known.clear()
    assert proof.trouble(device) is None
    assert wgmma.copies(), "it is remembered"
    wgmma.keep_copies(False)
    proof._known.clear()
    monkeypatch.setenv(proof.SWITCH, "trusted")
    assert proof.trouble(device) is None
    assert wgmma.copies(), "without a proof, too, where one is known"


def test_what_does_not_end_is_not_tried_again(monkeypatch, device):
    calls: list[object] = []
    monkeypatch.setattr(proof, "prove", lambda *given, **_: untyped(calls).append(given) or "not done after 120 s")
    assert proof.trouble(device) == "not done after 120 s"
    assert len(calls) == 1


def test_where_nothing_can_be_written_it_is_proven_again(monkeypatch, device, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    calls: list[object] = []
    monkeypatch.setattr(proof, "prove", lambda *_, **__: untyped(calls).append(1) or "")
    for count in (1, 2):
        proof._known.clear()
        assert proof.trouble(device) is None
        assert proof.trouble(device) is None, "once a process"
        assert len(calls) == count


def test_the_switch(monkeypatch, device):
    monkeypatch.setattr(proof, "prove", lambda *_, **__: pytest.fail("nothing is to be proven"))
    monkeypatch.setenv(proof.SWITCH, "off")
    assert proof.trouble(device) == "FASTENSDISTILL_WGMMA=off"
    assert proof.state(device) == "not asked about, FASTENSDISTILL_WGMMA=off"
    assert proof.advice(device) == "Triton computes the convolutions: FASTENSDISTILL_WGMMA=off"
    assert Dispatch.on(device).predicted == ()
    proof._known.clear()
    monkeypatch.setenv(proof.SWITCH, "trusted")
    assert proof.trouble(device) is None
    assert proof.advice(device) == ""
    assert Dispatch.on(device).predicted == PREDICTED
    proof._known.clear()
    monkeypatch.setenv(proof.SWITCH, "no")
    with pytest.raises(InputError, match="unknown value of FASTENSDISTILL_WGMMA 'no'"):
        proof.trouble(device)


def test_nothing_is_proven_where_there_is_nothing_to_prove(monkeypatch, device):
    monkeypatch.setattr(proof, "prove", lambda *_, **__: pytest.fail("nothing is to be proven"))
    assert proof.trouble(torch.device("cpu")) == ""
    assert proof.state(device).startswith("not tried yet; the next run")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert proof.trouble(device) == ""
    proof._known.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(extension, "serves", lambda name, device: False)
    assert proof.trouble(device) == ""
    assert proof.advice(device) == ""
    assert Dispatch.on(device).predicted == ()
    assert proof.state(device) == "none in this build for this device"


def test_of_several_processes_the_first_proves(monkeypatch, device):
    """The others take its outcome where their GPU is of the same kind, and all take what is worst."""
    monkeypatch.setattr(proof, "prove", lambda *_, **__: pytest.fail("process 1 proves nothing"))
    monkeypatch.setattr(proof, "rank", lambda: 1)
    told: list[object] = []
    monkeypatch.setattr(proof, "anyone", lambda found: untyped(told).append(found) or found)
    given = (OWN, None), (OWN, "wrong"), (OWN | {"device": "H200"}, None)
    for identity, found in given:
        first = identity, (found, False)
        monkeypatch.setattr(proof, "from_first", lambda value, first=first: first)
        proof._known.clear()
        own = proof.trouble(device)
        assert own == found or str(own).startswith("process 1 has another device")
        assert told.pop() == own


def test_what_one_process_finds_for_itself_the_others_still_ask_together(monkeypatch, device):
    """In a validation, say, where it is alone; what all have found it knows there, too."""
    calls: list[str] = []
    monkeypatch.setattr(proof, "settle", lambda *_: untyped(calls).append("proven") or Outcome(""))
    monkeypatch.setattr(proof, "from_first", lambda value: untyped(calls).append("asked") or value)
    assert proof.trouble(device) is None
    monkeypatch.setattr(proof, "processes", lambda: 2)
    monkeypatch.setattr(proof, "anyone", lambda found: found)
    for _ in range(2):
        assert proof.trouble(device) is None
    assert calls == ["proven", "asked", "asked"], "the second time it is remembered, and nobody is kept waiting"
    monkeypatch.setattr(proof, "processes", lambda: 1)
    assert proof.trouble(device) is None
    assert len(calls) == 3


def fused_alone(verify, build):
    """How the fused step is tried and built; no other is to be."""
    return untyped(select.Attempts)(verify, build, *[None] * 4)


def test_engines_are_told(monkeypatch, device):
    """The proof comes before the check of a step, where processes are not alone yet; why not is part of the line."""
    order: list[str] = []
    monkeypatch.setattr(proof, "prove", lambda *_, **__: untyped(order).append("prove") or "killed by SIGABRT")

    class Step:
        implementations, rate, dtype = Dispatch(), torch.zeros(()), torch.bfloat16

    def verify():
        order.append("verify")
        return {"update": 0.0}

    class Config:
        engine, batch_size = "auto", 8

    choice = EngineChoice("fused", "every layer has a kernel")
    _, made = untyped(select.build_step)(Config, choice, device, fused_alone(verify, Step))
    assert order == ["prove", "prove", "verify"], "twice, the second time with copies"
    assert "not proven on this device (killed by SIGABRT; again: " in str(made)
    assert "\n" not in str(made)


def test_who_has_no_such_kernels_on_a_device_that_could_is_told(monkeypatch, device):
    monkeypatch.setattr(extension, "serves", lambda name, device: False)

    class Step:
        implementations, rate, dtype = Dispatch.on(device), torch.zeros(()), torch.bfloat16

    class Config:
        engine, batch_size = "auto", 8

    choice = EngineChoice("fused", "every layer has a kernel")
    for arch, advised in ((90, True), (80, False), (0, False)):
        monkeypatch.setattr(select, "device_arch", lambda x, arch=arch: arch)
        _, made = untyped(select.build_step)(Config, choice, device, fused_alone(lambda: {"update": 0.0}, Step))
        assert str(made).endswith(select.SLOWER) == advised


@pytest.fixture(scope="module")
def launches():
    network = trace(PreResNet(5, blocks=(1, 1), in_planes=16, widen=2), (3, 8, 8))
    plans = plan_step(network, network, 2, 2, 4).values()
    return [(part, launch) for plan in plans for part in plan.parts for launch in part.launches]


def test_predicted_rows_choose_what_is_covered(monkeypatch, device, launches):
    table = Dispatch((), PREDICTED)
    named = {(launch.op, launch.node): table.implementation(part, launch, 90) for part, launch in launches}
    assert named["conv", "stem"] == "triton", "3 channels"
    convolutions = {key: name for key, name in named.items() if key[0] in PREDICTED_OPS and key[1] != "stem"}
    assert len(convolutions) > 10
    assert set(convolutions.values()) == {"wgmma"}
    assert {name for (op, _), name in named.items() if op not in PREDICTED_OPS} == {"triton"}
    for arch in (0, 80, 100):
        assert {table.implementation(part, launch, arch) for part, launch in launches} == {"triton"}
    assert {table.implementation(part, launch, 90, torch.float32) for part, launch in launches} == {"triton"}
    monkeypatch.setattr(extension, "serves", lambda name, device: False)
    assert {table.implementation(part, launch, 90) for part, launch in launches} == {"triton"}
    assert table.missing(90)
    assert not table.missing(80)


def test_a_plan_says_how_many_launches_each_row_decides_about(launches):
    parts = {id(part): part for part, _ in launches}.values()
    lines = dispatch.decisions(parts, 90)
    assert sum(int(line.split()[0]) for line in lines) == sum(launch.op in dispatch.OPS for _, launch in launches)
    assert sum(" by wgmma (predicted, not measured: " in line for line in lines) == 3
    (others,) = dispatch.decisions(parts, 80)
    assert others.endswith("launches: others by triton, the op itself")


def test_a_measured_row_beats_a_predicted_one(device, launches):
    table = Dispatch([Choice("conv", "triton", "measured", arch=90)], PREDICTED)
    part, launch = next(one for one in launches if one[1].op == "conv" and one[1].node != "stem")
    assert table.implementation(part, launch, 90) == "triton"
    row = table.choice("weight gradient", part.network.by_name[launch.node], 90)
    assert row is not None
    assert row.predicted
    assert str(row).startswith("weight gradient sm_90 by wgmma (predicted, not measured: 250 FLOP")
    measured = table.choice("conv", part.network.by_name[launch.node], 90)
    assert str(measured) == "conv sm_90 by triton (measured)"


def test_what_a_predicted_kernel_refuses_the_op_computes_and_a_users_table_is_refused(monkeypatch, device, launches):
    def refusing(*arguments, **options):
        raise InputError("does not cover 3 sources")

    part, launch = next(one for one in launches if one[1].op == "conv" and one[1].node != "stem")
    monkeypatch.setattr(wgmma, "kernel", lambda op: refusing)
    monkeypatch.setattr(dispatch, "device_arch", lambda x: 90)
    node = untyped(part.network.by_name[launch.node])
    x = torch.randn(1, 2, 4, 4, node.in_shape[0]).bfloat16()
    weight = torch.randn(1, node.kernel**2, node.in_shape[0], node.shape[0]).bfloat16()
    given = x, weight, torch.zeros(1, dtype=torch.int32)
    options = {"kernel": node.kernel, "padding": node.padding}
    found = Dispatch((), PREDICTED)(part, launch, grouped_conv)(*given, **options)
    assert isinstance(found, ConvOutput)
    assert torch.equal(found.z, untyped(grouped_conv)(*given, **options).z)
    named = Dispatch([Choice("conv", "wgmma", "a user's")], ())
    with pytest.raises(InputError, match=f'the table names "wgmma" for conv {launch.node}: does not cover 3 sources'):
        named(part, launch, grouped_conv)(*given, **options)
    monkeypatch.setattr(dispatch, "device_arch", lambda x: 0)
    monkeypatch.setattr(wgmma, "kernel", lambda op: None)
    with pytest.raises(InputError, match=f'"wgmma" for conv {launch.node}: there is no wgmma kernel for it'):
        named(part, launch, grouped_conv)(*given, **options)


def test_what_has_no_wgmma_kernel_is_not_named():
    with pytest.raises(InputError, match="flat gradient has no wgmma implementation; expected triton or cudnn"):
        Choice("flat gradient", "wgmma", "")
    assert set(wgmma.KERNELS) == {grouped_conv, conv_data_gradient, conv_weight_gradient}

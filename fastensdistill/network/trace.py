"""An ``nn.Module`` becomes a ``Network``: ``torch.fx`` records the operations, ``reader.py`` makes typed nodes of them.

What has no effect of its own is absorbed: identity, flatten, dropout in evaluation, adaptive pooling to the size at
hand. An operation outside the list raises one ``InputError`` that names the module, the operation and the setting that
does not fit; the caller then uses the reference engine for that network. ``engine/probe.py`` compares what came
out with the module itself.
"""

from __future__ import annotations

import torch
from torch import nn

from fastensdistill.errors import InputError
from fastensdistill.method.copying import copy_network
from fastensdistill.network.nodes import Network, Shape
from fastensdistill.network.reader import Reader
from fastensdistill.network.recording import Recorder
from fastensdistill.network.unseen import check_unseen, generators_kept, refusing


def trace(module: nn.Module, input_size: Shape, trains: bool = False) -> Network:
    """The network of ``module`` for images of ``input_size`` (C, H, W), as it computes in evaluation mode.

    With ``trains`` in training mode too, which has to be the same but for dropout and BatchNorm's statistics. Recorded
    on a copy: ``module`` is left as it is, in whatever mode.
    Raises ``InputError`` naming the module, and what in it cannot be planned.
    """
    kind = type(module).__name__
    with refusing(f"{kind}: cannot be traced"):
        check_unseen(module)
    with torch.inference_mode(False):
        return _both(module, input_size, trains)


def _both(module: nn.Module, input_size: Shape, trains: bool) -> Network:
    kind = type(module).__name__
    with refusing(f"{kind}: cannot be traced"):
        own = copy_network(module, forget=True)
    evaluated = _traced(own, input_size, False, trains).evaluated
    if not trains:
        return evaluated
    trained = _traced(own, input_size, True, trains)
    if trained.evaluated != evaluated:
        raise InputError(f"{kind}: has other operations in training than in evaluation mode")
    return trained


def _traced(module: nn.Module, input_size: Shape, training: bool, trains: bool) -> Network:
    kind, recorder = type(module).__name__, Recorder(module, input_size)
    try:
        with generators_kept(module):
            module.train(training)
            graph = recorder.record()
    except Exception as error:  # whatever user code raises when it meets a symbolic value
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{kind}: cannot be traced after module {recorder.path!r}: {reason}") from error
    reader = Reader(module, recorder, input_size, training, trains)
    try:
        return reader.read(graph)
    except InputError:
        raise
    except Exception as error:  # a setting that no layer has been seen with
        reason = next(iter(str(error).strip().splitlines()), "")
        raise reader.refuse(f"{type(error).__name__}: {reason}") from error

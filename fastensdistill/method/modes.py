"""Evaluation mode, gradients through a network but not to its weights, and weights stored channels last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Moded = TypeVar("Moded", bound=nn.Module)


def set_mode(module: Moded, training: bool) -> Moded:
    """``module`` in training or evaluation mode; a program of ``torch.export`` stays in that of its export.

    By ``train``, which networks that keep layers in evaluation mode override, some without returning themselves.
    """
    try:
        module.train(training)
    except NotImplementedError:
        if training:
            raise
    return module


def channels_last(module: Moded) -> Moded:
    """``module`` with its weights of convolutions over images stored channels last; all else, in whatever
    dimensions, as it was: ``Module.to`` raises for weights of five."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return module


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and every submodule's own mode back afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    set_mode(module, False)
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def without_weight_gradients(module: nn.Module) -> Iterator[None]:
    """Inside, results depend on the input alone; afterwards every parameter has its own ``requires_grad`` back."""
    trained = [p for p in module.parameters() if p.requires_grad and p.is_leaf]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)

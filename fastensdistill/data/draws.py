"""Which images of a split are set aside: drawn class by class, and always the same for the same labels.

The seed is fixed: teachers and students of whatever seeds must share their validation images.
"""

from __future__ import annotations

import numpy as np

from fastensdistill.errors import InputError

SEED = 20220617
VALIDATION_SHARE = 0.1  # of the training images
TEST_SHARE = 0.2  # of every class, where there is no test split


def stratified_order(labels: np.ndarray, seed: int = SEED) -> np.ndarray:
    """A random order of ``0..N-1`` in which every beginning has the classes in their proportions.

    One image of every class comes first, so that ``C`` images hold all ``C`` classes whatever their sizes.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    _, inverse, counts = np.unique(labels[shuffled], return_inverse=True, return_counts=True)
    ranks = _ranks(inverse, counts)
    place = np.where(ranks == 0, -1.0, (ranks + 0.5) / counts[inverse])
    return shuffled[np.argsort(place, kind="stable")]  # stable: images of one place stay in random order


def draw_validation(labels: np.ndarray, count: int | None, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the validation images, both ascending.

    ``count`` images, by default a tenth, or one of each class where that is more and at most a fifth. The classes keep
    their proportions, with at least one image each where ``count`` allows; the last image of a class is never taken.
    Raises ``InputError``, which begins with ``label``, for a ``count`` that leaves a class without training images.
    """
    order = stratified_order(labels)
    _, inverse, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
    takeable = order[_ranks(inverse, counts) < counts[inverse] - 1]
    if not len(takeable):
        raise InputError(f"{label} has one image in every class; expected more, some of them to validate on")
    if count is None:
        share = round(VALIDATION_SHARE * len(labels))
        count = min(max(1, share, min(int((counts > 1).sum()), 2 * share)), len(takeable))
    if count > len(takeable):
        raise InputError(
            f"{label}: validation is {count}; expected at most {len(takeable)} of the {len(labels)} training images, "
            "so that every class keeps one"
        )
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[takeable[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def draw_test(labels: np.ndarray, classes: tuple[str, ...], seed: int, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and test images, ascending: of every class a fifth (rounded, at least one) is for
    testing. Raises ``InputError`` for a class of one image."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for number, name in enumerate(classes):
        members = np.flatnonzero(labels == number)
        if len(members) == 1:
            raise InputError(f"{label}: class {name!r} holds 1 image; expected at least 2, to train and to test")
        chosen[generator.permutation(members)[: max(1, round(TEST_SHARE * len(members)))]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _ranks(groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The how-manieth of its group each element is, from 0; ``counts`` are the sizes of the groups."""
    order = np.argsort(groups, kind="stable")
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - starts
    return ranks

"""Which names mean a training, validation or test split: ``train``, ``Training_set``, ``val2017``, ``dev``, ...

``eval`` is the test split; beside a test split it is the validation split.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from fastensdistill.errors import InputError

WORDS = {
    "train": "train", "training": "train", "trainset": "train", "trn": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation", "valset": "validation",
    "test": "test", "testing": "test", "testset": "test", "tst": "test",
    "eval": "eval", "evaluation": "eval",
}  # fmt: skip
FILLERS = {"", "set", "data", "dataset", "split", "images", "imgs", "img"}


def split_words(name: str) -> tuple[str | None, tuple[str, ...]]:
    """What a name says: ``train``, ``validation``, ``test``, ``eval`` or None, and its other words, fillers left out.

    >>> split_words("Training_set"), split_words("seg_test"), split_words("cat")
    (('train', ()), ('test', ('seg',)), (None, ('cat',)))
    """
    words = [re.sub(r"\d+$", "", word) for word in re.split(r"[\s_.-]+", name.lower())]
    roles = [WORDS[word] for word in words if word in WORDS]
    others = tuple(word for word in words if word not in WORDS and word not in FILLERS)
    return (roles[0] if len(roles) == 1 else None), others


def assign(names: Iterable[str], where: str) -> dict[str, str]:
    """The name of each split among ``names`` (``train``, ``validation``, ``test``), as far as they are there.

    Names that only have a word beside the split's in common are splits too (``seg_train``, ``seg_test``); one alone is
    not (``bullet train``). Raises ``InputError``, which begins with ``where``, for two names of one split.
    """
    groups: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names):
        role, others = split_words(name)
        if role is not None:
            groups[others][role].append(name)
    found = groups.get((), {})
    if not found:
        found = next((group for group in groups.values() if "train" in group and len(group) > 1), {})
    for several in found.values():
        if len(several) > 1:
            raise InputError(f"{where} has both {several[0]} and {several[1]}; expected one of them")
    splits = {role: several[0] for role, several in found.items()}
    if "eval" in splits:
        role = "validation" if "test" in splits else "test"
        if role in splits:
            raise InputError(f"{where} has {splits['eval']} beside {splits['validation']} and {splits['test']}; "
                             "expected at most three splits")  # fmt: skip
        splits[role] = splits.pop("eval")
    return splits

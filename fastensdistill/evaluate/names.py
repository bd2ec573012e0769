"""Unique row names, as short as possible while a reader can still tell them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Label:
    """What a row may be called: ``form`` with the end of ``path`` in place of ``{}``.

    ``short`` is its name as long as no other row has it; a row without a path has only that.
    """

    short: str
    path: Path | None = None
    form: str = "{}"

    def name(self, depth: int) -> str:
        """The name with ``depth`` parts of the path; 0 is the short one, and beyond the path it is the whole."""
        if not depth or self.path is None:
            return self.short
        parts = self.path.parts
        end = "/".join(parts[-depth:]) if depth < len(parts) else str(self.path)
        return self.form.replace("{}", end)


def distinct(labels: Sequence[Label]) -> list[str]:
    """A name for each label; those that share one get more of their paths, and a number where that says nothing."""
    depths = [0] * len(labels)
    deepest = max((len(label.path.parts) for label in labels if label.path), default=0)
    for depth in range(1, deepest + 1):
        names = [label.name(d) for label, d in zip(labels, depths, strict=True)]
        counts = Counter(names)
        if len(counts) == len(names):
            return names
        depths = [depth if counts[name] > 1 else d for name, d in zip(names, depths, strict=True)]
    names = [label.name(d) for label, d in zip(labels, depths, strict=True)]
    taken: set[str] = set()
    for i, name in enumerate(names):
        number = 1
        while names[i] in taken or (number > 1 and names[i] in names[i + 1 :]):
            number += 1
            names[i] = f"{name} ({number})"
        taken.add(names[i])
    return names

"""Match a file's tensors to a network: the prefix under which most names and shapes agree."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from fastensdistill.foreign.flatten import FileTensor

# What wrappers put into names, anywhere in them
WRAPPERS = {
    "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
}  # fmt: skip
# A copy of the weights under such a name is not the plain network, where there is another that fits as well
COPIES = re.compile(r"ema|avg|average|swa|shadow|teacher|momentum|target|best|last|old|init|backup|grad|exp_|copy|buf")
# What stands beside weights and is none: counters, and what tools and training modules register
COUNTERS = re.compile(
    r"(^|\.)(num_batches_tracked|total_ops|total_params|n_averaged|decay|ema_decay|num_updates|relative_position_index|attn_mask|_extra_state)$"
)
BESIDE = re.compile(
    r"^(criterion|loss\w*|\w+_loss|metrics?|\w+_(metrics?|acc|accuracy|auroc|f1)|acc|accuracy|optim\w*|\w*scheduler)(\.|$)"
)
Shape = tuple[int, ...] | None  # None: any


@dataclass
class Match:
    """The entries of a file that fit a network's names, under the prefix ``where``.

    ``extra`` are further names beside them; ``others`` the matches under other prefixes, of which as much fits;
    ``held`` the first names of the file where nothing fits. ``outer`` is what the network's own names begin with that
    the file's lack.
    """

    where: str = ""
    entries: dict[str, FileTensor] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    fitting: int = 0
    others: list[Match] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    outer: str = ""


def match(found: Mapping[str, FileTensor], wanted: Mapping[str, Shape], optional: Iterable[str] = ()) -> Match:
    """The prefix in ``found`` under which most of ``wanted``'s names stand with their shapes.

    ``optional`` names do not count. Of prefixes under which equally many fit, one that speaks of no copy is taken
    before the others (:data:`COPIES`).
    """
    plain = {canonical(name): name for name in wanted}
    names = plain if len(plain) == len(wanted) else {name: name for name in wanted}
    passed = set(optional)
    heads: dict[str, dict[str, str]] = defaultdict(dict)  # prefix → wanted name → path in the file
    for path in found:
        segments = path.split(".")
        for i in range(len(segments)):
            tail = ".".join(segments[i:])
            name = tail if tail in names else canonical(tail)
            if name in names and not (i and segments[i] in WRAPPERS and tail not in names):
                head = ".".join(segments[:i])
                if tail == names[name] or names[name] not in heads[head]:
                    heads[head][names[name]] = path
    if not heads:
        return Match(held=list(found)[:3])
    ranked = {head: _score(found, paths, wanted, passed) for head, paths in heads.items()}
    best = max(ranked.values())
    tied = sorted((h for h in heads if ranked[h] == best), key=lambda h: (bool(COPIES.search(h.lower())), len(h), h))
    matches = [_made(found, head, heads, best[0]) for head in tied]
    matches[0].others = matches[1:]
    return matches[0]


def plain_ones(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that do not say they are copies (EMA, averages, momentum)."""
    return [n for n in names if not COPIES.search(n.lower())]


def canonical(name: str) -> str:
    """``name`` without the segments that wrappers put in."""
    return ".".join(s for s in name.split(".") if s not in WRAPPERS)


def counts(name: str) -> bool:
    """Whether a name is a counter's, which no network needs."""
    return bool(COUNTERS.search(name))


def _score(
    found: Mapping[str, FileTensor], paths: dict[str, str], wanted: Mapping[str, Shape], optional: set[str]
) -> tuple[int, int]:
    needed = [(name, found[path].leaf) for name, path in paths.items() if name not in optional]
    shapes = [wanted[name] in (None, leaf.shape) for name, leaf in needed]
    return sum(shapes), len(needed)


def _made(found: Mapping[str, FileTensor], head: str, heads: dict[str, dict[str, str]], fitting: int) -> Match:
    paths = heads[head]
    entries = {name: found[path] for name, path in paths.items()}
    homes = {e.home for e in entries.values()}
    used = {*paths.values(), *(p for e in entries.values() for p in e.parts)}
    # Weights of another whole network beside these, as of an average, are not this one's
    elsewhere = {p for other, theirs in heads.items() if len(theirs) == len(paths) for p in theirs.values()}
    extra = []
    for path, entry in found.items():
        if path in used or path in elsewhere or entry.home not in homes or entry.parts:
            continue
        tail = path.removeprefix(f"{head}.") if head else path
        within = tail != path or not head
        counter = entry.leaf.shape == () and entry.leaf.dtype is not None and not entry.leaf.dtype.is_floating_point
        beside = counts(tail) or BESIDE.search(tail.removeprefix(f"{entry.home}.") if not head else tail)
        if within and not beside and not (counter and entry.leaf.dtype != torch.bool):
            extra.append(path)
    return Match(head, entries, extra, fitting)

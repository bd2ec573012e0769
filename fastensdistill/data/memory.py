"""Available memory, so that data that does not fit is refused before hours are spent on reading it."""

from __future__ import annotations

import os
from pathlib import Path

from fastensdistill.errors import InputError


def available_memory() -> int | None:
    """Bytes that this process can still allocate, as far as the system says; None where it does not."""
    found = [_meminfo(), _control_group()]
    known = [value for value in found if value is not None]
    if not known and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(known, default=None)


def check_memory(needed: int, what: str) -> None:
    """Raise ``InputError``, which begins with ``what``, where ``needed`` bytes are more than what is left."""
    available = available_memory()
    if available is not None and needed > available:
        raise InputError(
            f"{what} take {in_words(needed)} of memory, and {in_words(available)} are left; "
            "expected a smaller image_size or limit, or more memory"
        )


def in_words(count: int) -> str:
    """Bytes for people.

    >>> in_words(12_345_678_901)
    '12.3 GB'
    """
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB", "PB", "EB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.1f} {units[0]}" if units[0] != "bytes" else f"{count} bytes"


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _control_group() -> int | None:
    """What a container may still take; the pages of cached files in its use count as free."""
    folder = Path("/sys/fs/cgroup")
    for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        group = folder if most == "memory.max" else folder / "memory"
        try:
            lines = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
            cached = sum(int(value) for name, value in lines if name == "inactive_file")
            return max(int((group / most).read_text()) - int((group / used).read_text()) + cached, 0)
        except (OSError, ValueError):  # no such group, or no limit: "max"
            continue
    return None

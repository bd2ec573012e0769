"""The error every part raises for bad input: one sentence that names the value and what was expected.

The command line prints it as one line and exits with code 2. It is not a ``ValueError``: parsers of arguments take
those for their own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_NAMES = 30  # that one line lists


class InputError(Exception):
    """Input that cannot be used, or an environment that cannot do what was asked."""


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a registry, with the nearest known name.

    >>> str(unknown("model", "wrn28-4", ["wrn28_4", "resnet32"]))
    "unknown model 'wrn28-4'; did you mean 'wrn28_4'? Known: resnet32, wrn28_4"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    more = f", ... ({len(names)} in all)" if len(names) > MOST_NAMES else ""
    return InputError(f"unknown {what} {name!r}{hint} Known: {', '.join(names[:MOST_NAMES])}{more}")

"""The error every part raises for bad input: one sentence that names the value and what was expected.

The command line prints it as one line and exits with code 2. It is not a ``ValueError``: parsers of arguments take
those for their own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_NAMES = 30  # that one line lists
LONGEST = 2000  # characters of a line


class InputError(Exception):
    """Input that cannot be used, or an environment that cannot do what was asked."""


def one_line(text: str) -> str:
    """``text`` on one line of a terminal, what cannot be printed escaped and the middle of a very long one left out.

    >>> one_line("no such file: a\\n  b")
    'no such file: a b'
    """
    text = " ".join(line.strip() for line in text.splitlines() if line.strip())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


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

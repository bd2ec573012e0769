"""Flags: parse a command line into the settings of its command, and format the page that ``--help`` prints.

``--flag VALUE`` and ``--flag=VALUE``; several values after a flag that takes several, or with commas between them;
``--no-flag`` for one that is true or false. A setting is given once: nothing that was said is overridden in silence.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastensdistill.errors import InputError
from fastensdistill.settings import TRUTH, Setting, about, settings_of

CONFIG = Setting("config", Path, optional=True, meaning="Settings from a YAML file; flags win over it.")
OTHER_DASHES = "‐‑‒–—―−﹘﹣－"  # that editors and web pages put in the place of "--"


def read_flags(command: str, cls: type, argv: Sequence[str]) -> dict[str, Any]:
    """The settings of ``cls``, and ``config``, that are given in ``argv``.

    Raises InputError for anything that is not understood.
    """
    known = {**settings_of(cls), "config": CONFIG}
    loose_one = next((s for s in known.values() if s.positional), None)
    values: dict[str, Any] = {}
    loose: list[tuple[str, str]] = []  # what belongs to no flag, and what it stands behind
    behind, i = "", 0
    while i < len(argv):
        token, i = argv[i], i + 1
        if token == "--":
            loose += [(rest, token) for rest in argv[i:]]
            break
        if not is_flag(token):
            loose.append((token, behind))
            continue
        flag, equals, text = token.partition("=")
        setting, negated = find(command, flag, known)
        if setting.name in values:
            raise InputError(f"{flag}: given twice; expected once")
        taken = i
        while not equals and taken < len(argv) and not is_flag(argv[taken]):
            taken += 1
        words = [text] if equals else list(argv[i:taken])
        value: str | list[str]
        if setting.kind is bool:
            said = [w for w in words[:1] if equals or w.lower() in TRUTH]
            if negated and equals:
                raise InputError(f"{flag}: expected no value after it, got {text!r}")
            value, used = (said[0] if said and not negated else str(not negated)), len(said) * (not negated)
        elif not words:
            dashed = f", got the flag {argv[i]!r}" if i < len(argv) else ""
            raise InputError(f"{flag}: expected {setting.expected} after it{dashed}")
        elif setting.many:
            used = len(words) if loose_one is None or equals else own_words(words)
            value = words[:used]
        else:
            value, used = words[0], 1
        values[setting.name] = setting.value(value, setting.flag)
        i += 0 if equals else used
        behind = " ".join([token, *(words[:used] if not equals else [])])
    return values | positional(command, known, loose_one, loose, values)


def positional(
    command: str, known: Mapping[str, Setting], setting: Setting | None, loose: list[tuple[str, str]],
    values: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The setting that needs no flag, from the words that no flag took."""
    if not loose:
        return {}
    words = [word for word, _ in loose]
    if setting is None or (len(words) > 1 and not setting.many):
        word, behind = loose[0 if setting is None else 1]
        place = f" after {behind}" if behind else ""
        hint = f"; did you mean --teachers {word}?" if "teachers" in known and not behind and setting is None else ""
        raise InputError(f"unexpected {word!r}{place}: {command} takes "
                         f"{'flags' if setting is None else f'one {setting.name} and flags'}{hint}")  # fmt: skip
    if setting.name in values:
        raise InputError(f"{words[0]!r} and {setting.flag}: expected one of the two")
    return {setting.name: setting.value(words if setting.many else words[0], setting.name)}


def own_words(words: Sequence[str]) -> int:
    """How many of the ``words`` after a flag are its own: the files at their end stand for themselves."""
    count = len(words)
    while count > 1 and os.path.exists(os.path.expanduser(words[count - 1])) and not is_number(words[count - 1]):
        count -= 1
    return count


def is_number(token: str) -> bool:
    """Whether ``token`` is a number, a fraction (8/255) or a list of them, and so no flag if it begins with a dash."""
    try:
        float(token.replace("/", "").replace(",", ""))
    except ValueError:
        return False
    return True


def is_flag(token: str) -> bool:
    """Whether ``token`` begins like a flag, with a dash of any kind, and is no negative number."""
    return len(token) > 1 and token[0] in "-" + OTHER_DASHES and not is_number(token)


def find(command: str, flag: str, known: Mapping[str, Setting]) -> tuple[Setting, bool]:
    """The setting that ``flag`` names, and whether it says no to it."""
    name = flag.removeprefix("--").replace("-", "_")
    if flag.startswith("--") and name in known:
        return known[name], False
    if flag.startswith("--no-") and (setting := known.get(name.removeprefix("no_"))) and setting.kind is bool:
        return setting, True
    names = [s.flag[2:] for s in known.values()] + [f"no-{s.flag[2:]}" for s in known.values() if s.kind is bool]
    near = get_close_matches(flag.lstrip("-" + OTHER_DASHES).replace("_", "-").lower(), names, n=1, cutoff=0.6)
    hint = f"; did you mean --{near[0]}?" if near else f": fastensdistill {command} --help lists them"
    raise InputError(f"unknown flag {flag!r} of {command}{hint}")


def help_page(command: str, cls: type) -> str:
    """What the command does and every flag of it: its value, meaning, choices and default."""
    width = min(shutil.get_terminal_size().columns, 120)
    known = settings_of(cls)
    loose = next((s for s in known.values() if s.positional), None)
    words = f" [{loose.name.upper()}{' ...' if loose.many else ''}]" if loose else ""
    flags = " [--config FILE] [--FLAG VALUE ...]" if known else ""
    lines = [f"usage: fastensdistill {command}{words}{flags}", "", *textwrap.wrap(about(cls), width)]
    groups: dict[str, list[Setting]] = {}
    for s in known.values():
        groups.setdefault(s.group, []).append(s)
    for group, members in reversed(groups.items()):  # the command's own come first
        own = group == about(cls)  # said above
        lines += ["", *([] if own else textwrap.wrap(group, width))]
        for s in members:
            lines += entry(s, width)
    if known:
        lines += ["", *entry(CONFIG, width), f"{'  --help, -h':{INDENT}}This page."]
    return "\n".join(lines)


INDENT = 26
VALUES = {int: "N", float: "X", bool: "", str: "NAME", Path: "PATH"}


def entry(s: Setting, width: int) -> list[str]:
    """The lines of one flag."""
    value = "FILE" if s is CONFIG else VALUES[s.kind]
    flag = f"--[no-]{s.flag[2:]}" if s.kind is bool else f"{s.flag} {value}{' ...' if s.many else ''}"
    head = f"  {s.name.upper() if s.positional else flag}"
    text = s.meaning.replace("``", "")
    if s.choices and not all(choice in text for choice in s.choices):
        text += f" One of: {', '.join(s.choices)}."
    shown = " ".join(map(str, s.default)) if isinstance(s.default, tuple) else s.default
    if s.default not in (None, ()) and s.kind is not bool:
        text += f" (default: {shown:.6g})" if isinstance(shown, float) else f" (default: {shown})"
    body = textwrap.wrap(text, max(width - INDENT, 30))
    first = [head] if len(head) > INDENT - 2 else [f"{head:{INDENT}}{body.pop(0)}"]
    return first + [" " * INDENT + line for line in body]

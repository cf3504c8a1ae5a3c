"""From a command line to a command; what cannot be read is told in one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro

from losslab import __version__
from losslab.cli import commands
from losslab.errors import LosslabError, unknown

PAGES = (commands.Signals, commands.Smoothness, commands.Curvature, commands.Landscape, commands.Connect)
"""Commands whose ``--out`` is a file."""

COMMANDS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind
    for kind in (commands.Lecture, commands.Train, *PAGES, commands.Tickets, commands.Rules)
}

WORDS = {int: "a whole number", float: "a number"}


class Option(NamedTuple):
    """What a command may be given."""

    name: str
    """``--batch-size``, or ``TASK`` for what stands without a name."""
    kind: Any
    """Type of a value, or the choices."""
    many: bool
    required: bool
    empty: bool
    """Whether no values at all mean something: none of those there are by default."""

    @property
    def named(self) -> bool:
        """Whether it is given by its name."""
        return self.name.startswith("--")


def parse(arguments: Sequence[str]) -> Any:
    """The command that a line describes.

    An option that takes several values may be repeated, ``--claim C1 --claim C2`` is ``--claim C1 C2``; of
    any other the last counts.

    Raises:
        LosslabError: The line cannot be read, or its page could not be written.
        SystemExit: Help or the version was asked for and printed.
    """
    line = list(arguments) or ["--help"]
    if line == ["--version"]:
        print(f"losslab {__version__}")
        raise SystemExit(0)
    helping = not {"-h", "--help"}.isdisjoint(line)
    if not helping:
        line = _checked(line)
    named = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())
    kinds: Any = Union[named]  # noqa: UP007
    command = tyro.cli(
        kinds,
        prog="losslab",
        description="A laboratory for the optimization of neural networks.",
        args=line,
        config=(
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.DisallowNone,
        ),
    )
    if isinstance(command, PAGES) and command.out is not None:
        _check_page(command.out)
    return command


def options_of(command: str) -> list[Option]:
    """What a command may be given, in the order of its help."""
    kind = COMMANDS[command]
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in fields(kind):
        hint, told = hints[field.name], []
        while get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            told += more
        named = next((name for t in told if (name := getattr(t, "name", None))), field.name)
        name = next((m for t in told if (m := getattr(t, "metavar", None))), f"--{named.replace('_', '-')}")
        many = get_origin(hint) is tuple
        parts = get_args(hint)
        if get_origin(hint) is not Literal and parts:
            parts = next(part for part in parts if part not in (NoneType, ...))
        empty = many and field.default != ()
        found.append(Option(name, parts or hint, many, field.default is MISSING, empty))
    return found


def _split(options: Sequence[Option], tokens: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """What stands without a name, and each option with its values, in the order they were written."""
    by_name = {option.name: option for option in options}
    loose: list[str] = []
    given: list[tuple[str, list[str]]] = []
    room, option = 0, None
    places = len([option for option in options if not option.named])
    for token in tokens:
        if re.match(r"--?[A-Za-z]", token):
            name, equals, value = token.partition("=")
            name = name.replace("_", "-")
            option = by_name.get(name)
            room = 10**9 if option is None or option.many else int(option.kind is not bool)
            given.append((name, [value] if equals else []))
            room -= bool(equals)
        elif room > 0 and not (option and option.many and _strays(option, token) and len(loose) < places):
            given[-1][1].append(token)
            room -= 1
        else:
            loose.append(token)
    return loose, given


def _checked(line: Sequence[str]) -> list[str]:
    """The same line with each option once.

    The parser would refuse the same mistakes, but in boxes of many lines.
    """
    command, *rest = line
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    options = options_of(command)
    loose, given = _split(options, rest)
    by_name = {option.name: option for option in options if option.named}
    together: dict[str, list[str]] = {}
    for name, values in given:
        if name not in by_name:
            raise unknown(f"option of losslab {command}", name, by_name)
        together[name] = (together.get(name, []) if by_name[name].many else []) + values
    places = [option.name for option in options if not option.named]
    wanted = [option.name for option in options if not option.named and option.required]
    if len(loose) < len(wanted):
        told = wanted[len(loose)]
        raise LosslabError(
            f"losslab {command} was given no {told}: write losslab {command} {told}, then the options"
        )
    if len(loose) > len(places):
        over = loose[len(places)]
        raise LosslabError(
            f"losslab {command} got {over!r}, which belongs to no option: write --OPTION VALUE, and losslab "
            f"{command} --help for what there is"
        )
    for name, option in by_name.items():
        if name in together:
            _check_values(option, together[name])
        elif option.required:
            raise LosslabError(f"losslab {command} was given no {name}: add {name} VALUE")
    return [command, *loose, *(part for name, values in together.items() for part in (name, *values))]


def _strays(option: Option, value: str) -> bool:
    """Whether a value is none of an option's, but what stands without a name: ``--lr 0.1 FILE.py:NAME``."""
    try:
        _check_values(option, [value])
    except LosslabError:
        return True
    return False


def _check_values(option: Option, values: Sequence[str]) -> None:
    if option.kind is bool:
        if values:
            raise LosslabError(f"{option.name} takes no value: write it alone")
        return
    if not values and not option.empty:
        raise LosslabError(f"{option.name} was given no value: write {option.name} VALUE")
    for value in values:
        if isinstance(option.kind, tuple):
            if value not in option.kind:
                raise unknown(f"value of {option.name}", value, option.kind)
            continue
        try:
            option.kind(value)
        except ValueError as error:
            wanted = WORDS.get(option.kind, "another value")
            raise LosslabError(f"{option.name} got {value!r}: give {wanted}") from error


def _check_page(path: Path) -> None:
    """Refuses, before any work, a page that could not be written."""
    if path.is_dir():
        raise LosslabError(f"--out is {path}, a folder: name a file in it, such as {path / 'page.html'}")
    above = next(place for place in path.absolute().parents if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        reason = "cannot be written to" if above.is_dir() else "is a file"
        raise LosslabError(f"cannot write {path} ({above} {reason}): choose another place for the page")


def _silent(kind: type[Any]) -> None:
    """Keeps the help from telling defaults that say nothing."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        quiet = field.default is None or field.default is False or field.default == ()
        if quiet and get_origin(hints[field.name]) is not Annotated:
            kind.__annotations__[field.name] = Annotated[
                hints[field.name], tyro.conf.arg(help_behavior_hint="")
            ]


for _kind in COMMANDS.values():
    _silent(_kind)

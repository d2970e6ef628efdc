"""One tree of exceptions: what the user did wrong, and what went wrong by itself."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolyrankError(Exception):
    """Root of every error that polyrank raises on purpose."""


class UserError(PolyrankError, ValueError):
    """A mistake in what was given: the command line prints it as one line and exits with status 2."""


class ConfigError(UserError):
    """A field of a configuration has a wrong type, a wrong value, or contradicts another field."""


class UnknownNameError(UserError, KeyError):
    """A name that no registry entry, field or choice carries."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class DataError(UserError):
    """A data file or a record is missing, malformed or empty."""


class CheckpointError(UserError):
    """A saved folder is truncated, foreign, or does not fit the model that should load it."""


class VersionError(PolyrankError, ImportError):
    """An installed package lies outside the range that was tested."""


class RunError(PolyrankError, RuntimeError):
    """A run failed for a reason that is no mistake of the user (exit status 1)."""


def printable(text: str) -> str:
    """Text for a terminal: what it would obey (escape sequences, marks that turn the direction) becomes "?"; names and
    messages come from files of others. Line breaks stay."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in text)


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is closest to the one given, or None where nothing is close."""
    names = {str(name).lower(): str(name) for name in allowed}
    matches = difflib.get_close_matches(str(given).lower(), list(names), n=1, cutoff=0.5)
    return names[matches[0]] if matches else None


def name_message(kind: str, given: object, allowed: Iterable[str]) -> str:
    """One line that says what was given, what is nearest and what is allowed."""
    allowed = sorted(str(name) for name in allowed)
    hint = nearest(str(given), allowed)
    did_you_mean = f"; did you mean {hint!r}?" if hint else ""
    return f"unknown {kind} {given!r}{did_you_mean} (allowed: {', '.join(allowed) or 'none'})"


def unknown_name(kind: str, given: object, allowed: Iterable[str]) -> UnknownNameError:
    """The error for a name that is not among those allowed, with the nearest one named."""
    return UnknownNameError(name_message(kind, given, allowed))


def check_choice(field: str, given: object, allowed: Iterable[str]) -> None:
    """Raise ConfigError unless `given` is one of the allowed values of a configuration field."""
    allowed = list(allowed)
    if given not in allowed:
        raise ConfigError(name_message(field, given, allowed))

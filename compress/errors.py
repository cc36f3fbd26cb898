"""Errors that a user can cause. The command line prints them as one line and one hint, never as a traceback."""

from __future__ import annotations


class CompressError(Exception):
    """A mistake or a mishap that the user can mend: what happened, and one thing to try.

    `usage` marks a wrong option or argument (exit code 2); everything else is exit code 1.
    """

    def __init__(self, message: str, *, hint: str | None = None, usage: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = 2 if usage else 1


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """A hint for an unknown name: the nearest known one if any is near, and the whole list."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    listing = ", ".join(known)
    return f"did you mean {close[0]}? known: {listing}" if close else f"known: {listing}"

"""Logging: a library import configures nothing; the command line calls `configure`."""

from __future__ import annotations

import logging
import sys


def configure(debug: bool = False) -> None:
    """Send the package's log to stderr as plain lines."""
    root = logging.getLogger("compress")
    root.handlers = [logging.StreamHandler(sys.stderr)]
    root.handlers[0].setFormatter(logging.Formatter("%(levelname)s: %(message)s" if debug else "%(message)s"))
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.propagate = False

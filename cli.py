"""Launcher for a checkout: `python cli.py …` is `compress …`. Never installed."""

import sys
from pathlib import Path

root = Path(__file__).resolve().parent
sys.path[:0] = [str(root), str(root / "kernels")]

from compress.cli import main  # noqa: E402

if __name__ == "__main__":
    main()

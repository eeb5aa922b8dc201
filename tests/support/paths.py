"""Where the repository is, and these helpers: for tests in any folder, and for the programs that they start."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent

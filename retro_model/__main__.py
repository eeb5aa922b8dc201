"""`python -m retro_model` runs the command `retro`."""

import sys

from retro_model.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""What a benchmark says of a figure, so that `make bench` can put all of them into one table.

    measured("training step, float32", ratio=1.59, at_least=2, ours=778, theirs=488, limit=1005, unit="tokens/s")

A benchmark joins `make bench` (benchmarks/run_all.py) by calling this beside its prints, and by a constant
that says how it is run there: command lines, of which a piece with {theirs} is left out where retro-pytorch
is not installed, and a line with {needed_theirs} as a whole.

    MAKE_BENCH = {"full": ["--theirs {theirs}"], "quick": ["--turns 1 --theirs {theirs}"]}
"""

import json
import os
from pathlib import Path

FILE = "RETRO_MEASURED"  # the environment variable that names the file of lines


def measured(
    what: str,
    *,
    ratio: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    ours: float | None = None,
    theirs: float | None = None,
    limit: float | None = None,
    unit: str = "",
) -> None:
    """Notes a figure: this project's, retro-pytorch's, the limit's, and the ratio that a target speaks of.

    `limit` is what is reached by the part of the work that cannot be done without, alone. A line of JSON
    goes to the file that `make bench` named; nothing happens where it did not.
    """
    if FILE in os.environ:
        figures = {"ratio": ratio, "at_least": at_least, "at_most": at_most, "ours": ours, "theirs": theirs}
        with Path(os.environ[FILE]).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"what": what, **figures, "limit": limit, "unit": unit}) + "\n")

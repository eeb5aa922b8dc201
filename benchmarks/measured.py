"""Record the results of a benchmark, so that `make bench` can print all of them in one table.

    record_result("training step, float32", ratio=1.59, at_least=2, ours=778, theirs=488, limit=1005, unit="tokens/s")

To join `make bench` (benchmarks/run_all.py), a benchmark calls `record_result` beside its prints and defines a
constant with the command lines to run. Without retro-pytorch, an option with {theirs} is dropped, and a line with
{needed_theirs} is skipped.

    MAKE_BENCH = {"full": ["--theirs {theirs}"], "quick": ["--turns 1 --theirs {theirs}"]}
"""

import json
import os
from pathlib import Path

FILE = "RETRO_MEASURED"  # environment variable with the path of the file to append to


def record_result(
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
    """Record the figures of this project, retro-pytorch and the limit, and the ratio that the target is about.

    `limit` is the figure of the indispensable part of the work alone. Appends a line of JSON to the file that `make
    bench` names in the environment; does nothing without it.
    """
    if FILE in os.environ:
        figures = {"ratio": ratio, "at_least": at_least, "at_most": at_most, "ours": ours, "theirs": theirs}
        with Path(os.environ[FILE]).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"what": what, **figures, "limit": limit, "unit": unit}) + "\n")

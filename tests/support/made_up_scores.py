"""ColumnScores with made-up losses."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from retro_model.evaluation.scoring import Scorer
from retro_model.evaluation.statistics import ColumnScores


def scores_of(scorer: Scorer, **losses: npt.NDArray[Any]) -> ColumnScores:
    """ColumnScores of columns with these losses (rows, M); the baseline costs a nat a token, all others nothing."""
    nothing = np.zeros(scorer.labels.shape)
    columns = {name: losses.get(name, nothing) for name in ("baseline", "off", "on", "random")}
    columns["baseline"] = losses.get("baseline", nothing + 1)
    saved = (columns["off"] - columns["on"]) / math.log(2)
    scores = ColumnScores(scorer.documents, scorer.bytes, scorer.is_label, saved)
    for name, found in columns.items():
        scores.add(name, found.sum(axis=1), int(scorer.is_label.sum()))
    return scores

"""The bigram rule that copies, token by token: slow and obvious."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from retro_model.training.copying import Rule

PAD = 0


def slow_rule(
    inputs: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    retrieved: npt.NDArray[Any],
    documents: npt.NDArray[Any],
) -> Rule:
    """Token by token: which neighbors it attends to, what followed the current token there."""
    probability = np.zeros(labels.shape)
    matched, right = np.zeros(labels.shape, bool), np.zeros(labels.shape, bool)
    num_tokens = labels.shape[1]
    for chunk in range(len(labels)):
        for token in range(num_tokens):
            reader = chunk if token == num_tokens - 1 else chunk - 1
            if labels[chunk, token] == PAD or reader < 0 or documents[reader] != documents[chunk]:
                continue
            followers = Counter[int]()
            for neighbor in retrieved[reader]:
                for place in range(1, len(neighbor)):
                    pair = (int(neighbor[place - 1]), int(neighbor[place]))
                    if PAD not in pair and pair[0] == inputs[chunk, token]:
                        followers[pair[1]] += 1
            if followers:
                matched[chunk, token] = True
                best = min(token for token, count in followers.items() if count == max(followers.values()))
                right[chunk, token] = best == labels[chunk, token]
                probability[chunk, token] = followers[int(labels[chunk, token])] / sum(followers.values())
    return Rule(probability, matched, right)

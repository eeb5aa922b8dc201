"""Look up the tokens of retrieved neighbors.

A row of a chunk artifact holds the M tokens of a chunk and the token after them. Neighbors are row numbers.
"""

import numpy as np
import numpy.typing as npt

from retro_model.core.arrays import IntArray
from retro_model.core.artifacts import Artifact

NO_ROW = -1  # no neighbor, or padding


def retrieved_tokens(database: Artifact, ids: IntArray) -> npt.NDArray[np.int64]:
    """Return the tokens (..., K, 2 * M) that the network reads for the database rows `ids` (..., K).

    They are the row's M input tokens, then those of the next row if it belongs to the same document, else pad.
    -1 means no neighbor and gives pad only.
    """
    tokens, documents = database["tokens"], database["documents"]
    num_tokens = tokens.shape[1] - 1
    flat = np.asarray(ids, dtype=np.int64).reshape(-1)
    assert flat.min(initial=0) >= NO_ROW, "a neighbor is a row of the database, or -1"
    (found,) = np.nonzero(flat != NO_ROW)
    rows = flat[found]
    following = np.minimum(rows + 1, len(tokens) - 1)
    continued = (following > rows) & (documents[following] == documents[rows])
    retrieved = np.full((len(flat), 2 * num_tokens), database.facts["pad_id"], dtype=np.int64)
    retrieved[found, :num_tokens] = tokens[rows][:, :-1]
    retrieved[found[continued], num_tokens:] = tokens[following[continued]][:, :-1]
    return retrieved.reshape(*np.shape(ids), 2 * num_tokens)

"""Type aliases for numpy arrays."""

from typing import Any

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.integer[Any]]  # of any width
FloatArray = npt.NDArray[np.floating[Any]]  # of any precision
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

"""Hardware utilization of a training step: the FLOP/s of its matrix products as a share of the peak.

model.step_flops(rows=4, length=512, neighbors=2) / seconds / peak(device, "bfloat16").rate
"""

import re
import time
from functools import lru_cache
from typing import NamedTuple

import torch

from retro_model.core.devices import NumberType, fast_float32_products

# Dense bfloat16 and float32 FLOP/s from the data sheets, by words of the chip's name; the first match counts.
DATA_SHEETS: dict[str, tuple[float, float]] = {
    "GH200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A10G": (70e12, 35e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}

# (rows, inner, columns) of the matrix products that are timed as the peak if no data sheet is known.
SHAPES = {"cpu": [(2048, 256, 1536), (1024, 1024, 1024)], "cuda": [(8192, 8192, 8192)]}
REPEATS = 4  # runs of each product; the fastest counts


class Peak(NamedTuple):
    """The device's peak in FLOP/s, and the source of that number."""

    rate: float
    source: str


def known_chip(name: str) -> str | None:
    """The key of DATA_SHEETS that matches a device's name, or None."""
    return next((chip for chip in DATA_SHEETS if re.search(rf"\b{chip}\b", name)), None)


def peak(device: torch.device, number_type: NumberType) -> Peak:
    """The peak from the device's data sheet if the chip is known, else the rate of the fastest matrix product."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if (chip := known_chip(name)) is not None:
        return Peak(DATA_SHEETS[chip][number_type == "float32"], f"the data sheet of {chip}")
    return Peak(_fastest_product(device, number_type, torch.get_num_threads()), "the fastest matrix product")


@lru_cache
def _fastest_product(device: torch.device, number_type: NumberType, threads: int) -> float:
    """In FLOP/s. Takes a tenth of a second, so it is measured once per setting."""
    dtype = torch.bfloat16 if number_type == "bfloat16" else torch.float32
    fastest = 0.0
    for m, k, n in SHAPES[device.type]:
        a, b = torch.ones(m, k, dtype=dtype, device=device), torch.ones(n, k, dtype=dtype, device=device)
        with fast_float32_products(device):
            for _ in range(REPEATS):
                started = _now(device)
                torch.nn.functional.linear(a, b)
                fastest = max(fastest, 2 * m * k * n / (_now(device) - started))
    return fastest


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

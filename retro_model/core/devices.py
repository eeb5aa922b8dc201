"""Where to compute, and in which numbers: what `auto` stands for on this machine."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from retro_model.core.errors import ConfigError

NumberType = Literal["float32", "bfloat16"]

# What glibc's mallopt is told, by the numbers of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` stands for here; `auto` is the GPU where there is one.

    Raises ConfigError where cuda is asked for and absent.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("runtime.device: found cuda, expected auto or cpu: torch sees no GPU here")
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    return torch.device(name)


def resolve_number_type(name: str, device: torch.device) -> NumberType:
    """The type of matrix products: `auto` is bfloat16 where `device` multiplies in it natively, else float32."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities = torch.cpu.get_capabilities()
            native = any(capabilities.get(feature, False) for feature in ("amx_bf16", "avx512_bf16"))
        return "bfloat16" if native else "float32"
    assert name in ("float32", "bfloat16"), name
    return "bfloat16" if name == "bfloat16" else "float32"


def keep_freed_memory() -> None:
    """Has this process keep the memory that it frees, up to its peak, for what it allocates next.

    By default glibc gives large blocks back to the system, and each step of a network on a CPU gets its
    activations anew, page by page: a tenth of a training step. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Before its version 2.35 glibc takes no more than 32 MiB for the first.
    if mallopt is not None and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def fast_float32_products(device: torch.device) -> Iterator[None]:
    """In the block, large float32 products on this CPU are by the library that uses all of it.

    MKL, which torch asks by default, has 256-bit products for AMD's processors, also for those with units of
    512 bits; oneDNN, which torch asks where it may round to bfloat16, has both and rounds only on AMX units.
    So where the processor is AMD's, has AVX-512 and no AMX, such leave is given, and the products stay float32.
    Products with a single row are slower by it, so writing is better left outside.
    """
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set where torch starts
    has = torch.cpu.get_capabilities()
    before = products.fp32_precision
    if device.type == "cpu" and "AMD" in has.get("cpu_name", "") and has.get("avx512_bw") and not has.get("amx_tile"):
        products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before

"""For training loops of your own; the library itself uses retro_model.core.devices."""

from retro_model.core.devices import fast_float32_products, keep_freed_memory, resolve_device

__all__ = ["fast_float32_products", "keep_freed_memory", "resolve_device"]

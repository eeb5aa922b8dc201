"""For training loops of your own; the library uses retro_model.core.devices."""

from retro_model.core.devices import fast_float32_products, resolve_device

__all__ = ["fast_float32_products", "resolve_device"]

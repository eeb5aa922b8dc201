"""Device functions for your own training loop; the library itself uses retro_model.core.devices."""

from retro_model.core.devices import fast_float32_products, resolve_device

__all__ = ["fast_float32_products", "resolve_device"]

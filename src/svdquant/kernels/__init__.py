"""Products of quantized linears: the reference, and the table that picks a path per device."""

from .dispatch import BACKENDS, DevicePath, device_path, resolve_activations, svdquant_linear, w4a16_linear

__all__ = ["BACKENDS", "DevicePath", "device_path", "resolve_activations", "svdquant_linear", "w4a16_linear"]

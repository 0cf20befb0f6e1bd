"""Quantized models on disk."""

from .canonical import load_model, save_model
from .info import CheckpointInfo, inspect

__all__ = ["CheckpointInfo", "inspect", "load_model", "save_model"]

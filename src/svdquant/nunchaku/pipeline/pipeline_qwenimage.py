"""Qwen-Image: diffusers' own pipeline does what the first releases had a class for."""

from diffusers import QwenImagePipeline as NunchakuQwenImagePipeline

__all__ = ["NunchakuQwenImagePipeline"]

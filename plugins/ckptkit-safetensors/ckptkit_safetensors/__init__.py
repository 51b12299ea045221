"""Checkpoints of ckptkit in safetensors files, and any safetensors file as a checkpoint."""

from ckptkit_safetensors.backend import SafetensorsBackend

__all__ = ["SafetensorsBackend"]

__version__ = "0.1.0"

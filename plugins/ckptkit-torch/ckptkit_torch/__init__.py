"""torch.Tensor as a leaf of ckptkit's checkpoints. Nothing here imports torch before there is a tensor to save or to make."""

from ckptkit_torch.handler import TorchHandler
from ckptkit_torch.optimizers import optimizer_state

__all__ = ["TorchHandler", "optimizer_state"]

__version__ = "0.1.0"

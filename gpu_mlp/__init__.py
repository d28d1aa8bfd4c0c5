"""gpu_mlp: multilayer perceptrons trained with hand-fused CUDA kernels, and the same program on a CPU through NumPy."""

from .history import EarlyStopping, History
from .losses import CrossEntropy
from .network import MLP, Gradients
from .optimizers import LBFGS, SGD, Adam, AdamW
from .regularizers import L1, L2, ElasticNet
from .training import Diverged, Trainer

__all__ = [
    "LBFGS",
    "L1",
    "L2",
    "MLP",
    "SGD",
    "Adam",
    "AdamW",
    "CrossEntropy",
    "Diverged",
    "EarlyStopping",
    "ElasticNet",
    "Gradients",
    "History",
    "Trainer",
]

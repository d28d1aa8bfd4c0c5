"""gpu_mlp: multilayer perceptrons trained with hand-fused CUDA kernels, and the same program on a CPU through NumPy."""

from typing import TYPE_CHECKING, Any

from .averaging import EMA
from .checkpoint import Checkpoints
from .failures import BrokenData, DeviceLost, Diverged, Terminated
from .history import EarlyStopping, History
from .logs import CSVLog, JSONLLog, TensorBoardLog
from .losses import (
    MAE,
    MSE,
    NLL,
    BinaryCrossEntropy,
    CrossEntropy,
    HalfMSE,
    Hinge,
    Huber,
    LogCosh,
    Poisson,
)
from .network import MLP, Gradients
from .optimizers import (
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
)
from .parallel import Parallel
from .regularizers import L1, L2, ElasticNet
from .schedules import (
    Constant,
    Cosine,
    Exponential,
    InverseScaling,
    OneCycle,
    ReduceOnPlateau,
    StepDecay,
    Warmup,
)
from .streams import Stream
from .training import Trainer

if TYPE_CHECKING:
    from .estimators import MLPClassifier as MLPClassifier
    from .estimators import MLPRegressor as MLPRegressor

__all__ = [
    "EMA",
    "L1",
    "L2",
    "LBFGS",
    "MAE",
    "MLP",
    "MSE",
    "NLL",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "BinaryCrossEntropy",
    "BrokenData",
    "CSVLog",
    "Checkpoints",
    "Constant",
    "Cosine",
    "CrossEntropy",
    "DeviceLost",
    "Diverged",
    "EarlyStopping",
    "ElasticNet",
    "Exponential",
    "Gradients",
    "HalfMSE",
    "Hinge",
    "History",
    "Huber",
    "InverseScaling",
    "JSONLLog",
    "Lion",
    "LogCosh",
    "Muon",
    "NAdam",
    "OneCycle",
    "Parallel",
    "Poisson",
    "RAdam",
    "RMSprop",
    "ReduceOnPlateau",
    "StepDecay",
    "Stream",
    "TensorBoardLog",
    "Terminated",
    "Trainer",
    "Warmup",
]

# Imported when asked for, since they bring scikit-learn along; not in __all__, so that `import *` does without it.
_LAZY = ("MLPClassifier", "MLPRegressor")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from . import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

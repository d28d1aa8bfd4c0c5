"""The data of the estimators: X, y and sample_weight, from the host or from a GPU, with scikit-learn's checks.

Leans on scikit-learn for what is on the host and on `ops` for what is not. X stays where it is, y and the weights come
to the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator
from sklearn.utils.validation import _check_n_features, _check_sample_weight, check_X_y, validate_data

from . import checks, ops
from . import precision as precisions
from .ops.interface import Operations

FLOATS = (np.float64, np.float32)
SPARSE = ("csr", "csc")
DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


def on_device(*arrays: Any) -> bool:
    """Whether any of these is in a GPU's memory: CuPy's, or one with ``__cuda_array_interface__`` or DLPack."""
    return any(
        hasattr(array, "__cuda_array_interface__")
        or (hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in DLPACK_CUDA)
        for array in arrays
    )


def from_device(estimator: BaseEstimator, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Any, Any, Any]:
    """X as a CuPy array, checked, where it is on the GPU; what else is there comes to the host, y and weights.

    X: (n_samples, n_features); y: (n_samples,) or (n_samples, n_outputs); sample_weight: (n_samples,) or None. With
    ``reset`` the estimator learns ``n_features_in_``, without it X must have as many.
    """
    if not on_device(X, y, sample_weight):
        return X, y, sample_weight
    work = ops.make(estimator.device, precisions.get("float32"))
    y, sample_weight = (work.to_host(work.to_device(a)) if on_device(a) else a for a in (y, sample_weight))
    return (_device_rows(estimator, work, X, reset) if on_device(X) else X), y, sample_weight


def checked(estimator: BaseEstimator, X: Any, y: Any, reset: bool, y_numeric: bool = False) -> tuple[Any, NDArray[Any]]:
    """X, (n_samples, n_features), and y, after scikit-learn's checks.

    Of an X on the GPU, which has had its own in `from_device`, a stand-in goes through them.
    """
    options = {"multi_output": True, "y_numeric": y_numeric, "dtype": FLOATS}
    if on_device(X):
        return X, check_X_y(_stand_in(X), y, estimator=estimator, **options)[1]
    return validate_data(estimator, X, y, accept_sparse=SPARSE, reset=reset, **options)


def weights(X: Any, sample_weight: Any, class_weight: NDArray[Any] | None) -> NDArray[Any] | None:
    """What every row of X weighs, (n_samples,): its own weight, checked, times that of its class; None for 1."""
    if sample_weight is not None:
        sample_weight = _check_sample_weight(sample_weight, _stand_in(X) if on_device(X) else X)
    if class_weight is None or sample_weight is None:
        return class_weight if sample_weight is None else sample_weight
    return sample_weight * class_weight


def unseen(estimator: BaseEstimator, work: Operations, X: Any) -> Any:
    """Rows to predict from, (n_samples, n_features), checked against those of the fit, as a network takes them."""
    if on_device(X):
        return _device_rows(estimator, work, X, reset=False)
    return rowwise(validate_data(estimator, X, accept_sparse=SPARSE, reset=False))


def rowwise(X: Any) -> Any:
    """A sparse X in the format whose rows can be taken; a dense one as it is."""
    return X.tocsr() if issparse(X) else X


def _device_rows(estimator: BaseEstimator, work: Operations, X: Any, reset: bool) -> Any:
    """X on the GPU, (n_samples, n_features), with the checks that scikit-learn makes of one on the host."""
    if not work.waits:
        checks.on_host("X", X)
    X = work.to_device(X)
    if X.ndim != 2:
        raise ValueError(f"X: expected 2 dimensions, (n_samples, n_features), got shape {X.shape}")
    if X.dtype not in FLOATS:
        X = work.to_device(X, np.float64)
    if not work.all_finite(X):
        raise ValueError("Input X contains NaN or infinity.")
    _check_n_features(estimator, X, reset=reset)
    if reset and hasattr(estimator, "feature_names_in_"):
        del estimator.feature_names_in_  # of an earlier fit; an array on the GPU has none
    return X


def _stand_in(X: Any) -> NDArray[Any]:
    """A host array of as many rows as X, for checks that count them."""
    return np.zeros((len(X), 1), X.dtype)

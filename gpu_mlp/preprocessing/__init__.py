"""Raw columns and targets -> the arrays the network sees, fitted on the training part and kept in the model as JSON.

A room for the inputs, one for the targets, and below them what both are made of; leans on `checks` and NumPy.
"""

from __future__ import annotations

from .columns import Columns
from .preprocessor import IMPUTE, MAX_CATEGORIES, Preprocessor
from .targets import Labels, TargetScaler, infer_task

__all__ = ["IMPUTE", "MAX_CATEGORIES", "Columns", "Labels", "Preprocessor", "TargetScaler", "infer_task"]

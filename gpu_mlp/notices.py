"""What a user should know once: a fallback that was taken, a choice that was made. A leaf."""

from __future__ import annotations

import warnings

_said: set[str] = set()


def say_once(notice: str) -> None:
    """A RuntimeWarning, at most once in a process."""
    notice = " ".join(notice.split())
    if notice not in _said:
        _said.add(notice)
        warnings.warn(notice, RuntimeWarning, stacklevel=3)

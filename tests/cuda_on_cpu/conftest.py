"""Makes the fixture known to the tests of this folder."""

from .fixtures import emulated_gpu  # noqa: F401

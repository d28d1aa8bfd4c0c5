"""Measuring whole training steps against their bare GEMMs and against other libraries: behind `gpu-mlp bench`.

The topmost room beside the command line. `benchmarks/` in the repository has the rest of the suite, which leans on it.
"""

"""Runs CUDA kernels on the CPU: g++ compiles their text, a scheduler watches every access, a stand-in plays CuPy."""

"""The CUDA sources, shipped as text: `gpu_mlp/ops/launch.py` puts them together and compiles them for the types at
hand.

Every source is written in terms of T, the storage type of activations and weights, and S, the type that formulas and
sums run in (float for 16-bit types and float, double for double); both are defined in front of it.
"""

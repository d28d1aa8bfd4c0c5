"""`python -m gpu_mlp` is the command `gpu-mlp`."""

from .cli import main

main()

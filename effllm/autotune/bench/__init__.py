"""The kernel benchmark: ops by shapes of real models, verified, then timed in turns with the kernels of peers (docs/kernel-benchmarks.md)."""

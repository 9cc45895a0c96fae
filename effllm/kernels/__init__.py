"""Compiled kernels: C++ for CPUs in `cpu/`, Triton for GPUs in `triton/`. Loaded lazily, per device."""

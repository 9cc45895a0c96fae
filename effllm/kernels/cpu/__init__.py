"""C++ kernels against PyTorch's stable ABI, built at first use."""

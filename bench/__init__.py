"""What the kernels cost: compiled offline and read (`python -m bench.audit`), without a GPU."""

"""The measuring house: what the kernels cost, read off the compiled code without a GPU, and timed on one."""

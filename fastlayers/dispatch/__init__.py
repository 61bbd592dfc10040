"""Which path does a call take, the kernels or torch's own function, and why?"""

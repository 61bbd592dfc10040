"""Doors (which path does this call take?) and autograd.Functions (how do gradients flow?), a file per family."""

"""What "right" means: the error budget of the tests and of the benchmark. Never imported at run time."""

from .budget import Errors, assert_within_budget, neighbours

__all__ = ["Errors", "assert_within_budget", "neighbours"]

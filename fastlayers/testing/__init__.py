"""One row per layer, and what "right" means: read by the tests and the README's table. Never imported at run time."""

from .budget import Errors, assert_within_budget, neighbours
from .specs import SPECS, Spec, Variant, table

__all__ = ["SPECS", "Errors", "Spec", "Variant", "assert_within_budget", "neighbours", "table"]

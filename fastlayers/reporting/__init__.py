"""What a model will do on a GPU, found without one."""

from .model import Report, Work, report

__all__ = ["Report", "Work", "report"]

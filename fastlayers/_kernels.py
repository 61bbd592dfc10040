"""Whether the kernels can be imported on this machine. `import fastlayers` must work without triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

MISSING: str | None = None
"""Why the kernels can't be imported, if they can't."""

if TYPE_CHECKING:
    from .kernels.runtime import launch
    from .kernels.runtime.launch import OutOfResources
    from .kernels.runtime.replay import Replayable, is_plain, without_none
else:
    try:
        from .kernels.runtime import launch
        from .kernels.runtime.launch import OutOfResources
        from .kernels.runtime.replay import Replayable, is_plain, without_none
    except ImportError as _error:
        MISSING = (
            "triton is not installed" if (_error.name or "").split(".")[0] == "triton" else f"no kernels: {_error}"
        )
        launch = None

        class OutOfResources(Exception):
            """What Triton raises where a GPU lacks the shared memory or the threads that a kernel needs."""

        def is_plain(tensor: Any) -> bool:
            return False

        def without_none(tensors: Any) -> Any:
            return tensors

        class Replayable:
            """Stands for the kernels' own where there is nothing to replay."""

            def __init__(self, work: Any):
                self.work = work


__all__ = ["MISSING", "OutOfResources", "Replayable", "is_plain", "launch", "without_none"]

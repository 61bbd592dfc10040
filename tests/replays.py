"""For tests that look inside: what is remembered of launches."""

from __future__ import annotations

import gc

import triton

from fastlayers.kernels.runtime import launch
from fastlayers.kernels.runtime.replay import Replayable


def forget() -> None:
    """All that any kernel or replay remembers of earlier launches: they were another driver's, or another launcher's."""
    # Their instances refer to these classes. gc.get_objects() takes three times as long.
    for thing in gc.get_referrers(Replayable, triton.JITFunction):
        if type(thing) is Replayable:
            thing.signatures.clear()
        elif type(thing) is triton.JITFunction and not launch.INTERPRETED:
            thing.device_caches.clear()

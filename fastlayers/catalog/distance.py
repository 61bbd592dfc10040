"""Distances between vectors."""

from __future__ import annotations

from typing import Any

from ..ops.distance import _cosine_similarity
from .row import Case, Row, case

__all__ = ["ROWS"]


def _pair(shape: tuple[int, ...], other: tuple[int, ...] | None = None, **options: Any) -> Case:
    return case(lambda nn: nn.CosineSimilarity(**options), shape, other or shape)


ROWS = (
    Row(
        "CosineSimilarity",
        "any dim, length and strides, tensors that are broadcast or of two dtypes; each read once in each direction, and beside "
        "them three numbers saved of each pair of vectors",
        "a tensor without dimensions",
        operation=_cosine_similarity,
        function="cosine_similarity",
        scale=1,
        speeds={
            "features, 32 x 256 x 56 x 56": _pair((32, 256, 56, 56)),
            "embeddings, 65536 x 768": _pair((65536, 768)),
            "normals, 16 x 3 x 480 x 640": _pair((16, 3, 480, 640)),
            "last features, 64 x 2048 x 7 x 7": _pair((64, 2048, 7, 7)),
            "all pairs, 256 x 256 x 512": _pair((256, 1, 512), (1, 256, 512), dim=-1),
            "gradients, 2^26": _pair((2**26,), dim=0),
            "odd, 4097 x 1001": _pair((4097, 1001)),
        },
        cases=dict(
            rows=_pair((9, 37)),
            images=_pair((2, 21, 5, 7)),
            volumes=_pair((3, 5, 19), dim=0),
            pairs=_pair((3, 1, 18), (1, 5, 18), dim=-1),
            channels=_pair((2, 7, 3, 5), (7, 1, 1)),
            middle=_pair((4, 3, 9), dim=-2, eps=1e-3),
            vector=_pair((1023,), dim=0),
        ),
    ),
)

"""Dropout."""

from ..fusion.dropout import PATTERNS, role_of
from ..fusion.plan import Role
from ..ops.dropout import _dropout
from .row import Case, Floats, Row, case

__all__ = ["PATTERNS", "ROWS"]

_SUPPORTS = "any p and strides, in place; {}the mask drawn again in the backward, two numbers saved"
_MASK = "the mask that torch draws on CUDA, with its generator moved as far; "


def _row(
    name: str,
    function: str,
    falls_back: str,
    cases: dict[str, Case],
    speeds: dict[str, Case],
    role: Role | None = None,
) -> Row:
    # Inside a CUDA graph, torch 2.13 says what is drawn.
    falls_back += ", a CUDA graph is captured, and this torch doesn't say what will be drawn in it"
    return Row(
        name,
        _SUPPORTS.format(_MASK),
        falls_back,
        operation=_dropout,
        function=function,
        random=True,
        role=role,
        cases=cases,
        speeds=speeds,
    )


_FEATURES_FALL_BACK = "p = 1, a number of dimensions of which torch warns"

ROWS = (
    _row(
        "Dropout",
        "dropout",
        "p = 1",
        dict(
            vectors=case(lambda nn: nn.Dropout(0.3), (6, 8)),
            single=case(lambda nn: nn.Dropout(0.1), (3, 5, 7)),
        ),
        {
            "2^27 elements": case(lambda nn: nn.Dropout(0.1), (2**27,)),
            "GPT-2 hidden, 8 x 1024": case(lambda nn: nn.Dropout(0.1), (8, 1024, 768)),
            "Llama-3 hidden, 8192 tokens": case(lambda nn: nn.Dropout(0.1), (8192, 4096)),
        },
        role=Role("dropout", of=role_of),
    ),
    _row(
        "Dropout1d",
        "dropout1d",
        "p = 1, unbatched input in place",
        dict(
            plain=case(lambda nn: nn.Dropout1d(0.4), (5, 6, 7)),
            unbatched=case(lambda nn: nn.Dropout1d(0.4), (9, 5)),
        ),
        {"audio, 64 x 256 x 4000": case(lambda nn: nn.Dropout1d(0.1), (64, 256, 4000))},
    ),
    _row(
        "Dropout2d",
        "dropout2d",
        _FEATURES_FALL_BACK,
        dict(
            plain=case(lambda nn: nn.Dropout2d(0.4), (3, 4, 5, 3)),
            channels_last=case(lambda nn: nn.Dropout2d(0.4), Floats((3, 4, 5, 3), True)),
        ),
        {
            "U-Net 64 @128, 16 images": case(lambda nn: nn.Dropout2d(0.1), (16, 64, 128, 128)),
            "U-Net in channels_last": case(lambda nn: nn.Dropout2d(0.1), Floats((16, 64, 128, 128), True)),
        },
    ),
    _row(
        "Dropout3d",
        "dropout3d",
        f"{_FEATURES_FALL_BACK}, unbatched input in place",
        dict(
            plain=case(lambda nn: nn.Dropout3d(0.4), (3, 4, 2, 3, 2)),
            unbatched=case(lambda nn: nn.Dropout3d(0.4), (7, 2, 3, 2)),
        ),
        {"volumes 32 @64 x 64 x 64, batch 2": case(lambda nn: nn.Dropout3d(0.1), (2, 32, 64, 64, 64))},
    ),
    _row(
        "AlphaDropout",
        "alpha_dropout",
        "p = 1",
        dict(plain=case(lambda nn: nn.AlphaDropout(0.3), (5, 13))),
        {"8192 x 4096": case(lambda nn: nn.AlphaDropout(0.1), (8192, 4096))},
    ),
    _row(
        "FeatureAlphaDropout",
        "feature_alpha_dropout",
        "p = 1",
        dict(plain=case(lambda nn: nn.FeatureAlphaDropout(0.3), (3, 4, 5))),
        {"64 x 256 x 4000": case(lambda nn: nn.FeatureAlphaDropout(0.1), (64, 256, 4000))},
    ),
)

"""Windows of images as columns, and back."""

from ..ops.fold import _fold, _unfold
from .row import Row, case

__all__ = ["ROWS"]

_NOTHING = "nothing beyond the last row"

ROWS = (
    Row(
        "Unfold",
        "kernel_size, dilation, padding, stride, unbatched input",
        _NOTHING,
        operation=_unfold,
        function="unfold",
        speeds={
            "3x3 64 @56, batch 32": case(lambda nn: nn.Unfold(3, padding=1), (32, 64, 56, 56)),
            "patches 16x16 3 @224, batch 64": case(lambda nn: nn.Unfold(16, stride=16), (64, 3, 224, 224)),
            "7x7/4 3 @224 of T2T, batch 64": case(lambda nn: nn.Unfold(7, padding=2, stride=4), (64, 3, 224, 224)),
        },
        cases=dict(
            padded=case(lambda nn: nn.Unfold((3, 2), padding=1), (2, 3, 5, 4)),
            strided=case(lambda nn: nn.Unfold(2, dilation=(2, 1), padding=(0, 1), stride=(1, 2)), (2, 3, 6, 5)),
            unbatched=case(lambda nn: nn.Unfold(2, stride=2), (3, 6, 4)),
        ),
    ),
    Row(
        "Fold",
        "output_size, kernel_size, dilation, padding, stride, unbatched input; sums in a fixed order",
        _NOTHING,
        operation=_fold,
        function="fold",
        speeds={
            "3x3 64 @56, batch 32": case(lambda nn: nn.Fold(56, 3, padding=1), (32, 576, 3136)),
            "patches 16x16 3 @224, batch 64": case(lambda nn: nn.Fold(224, 16, stride=16), (64, 768, 196)),
        },
        cases=dict(
            padded=case(lambda nn: nn.Fold((5, 4), (3, 2), padding=1), (2, 18, 25)),
            strided=case(lambda nn: nn.Fold((7, 5), 2, dilation=(2, 1), padding=(0, 1), stride=(1, 2)), (2, 12, 15)),
            unbatched=case(lambda nn: nn.Fold((6, 4), 2, stride=2), (12, 6)),
        ),
    ),
)

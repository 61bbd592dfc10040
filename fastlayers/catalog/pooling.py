"""Pooling."""

from ..ops.averaging import (
    _adaptive_avg_pool1d,
    _adaptive_avg_pool2d,
    _adaptive_avg_pool3d,
    _avg_pool1d,
    _avg_pool2d,
    _avg_pool3d,
)
from ..ops.pooling import (
    _adaptive_max_pool1d,
    _adaptive_max_pool2d,
    _adaptive_max_pool3d,
    _max_pool1d,
    _max_pool2d,
    _max_pool3d,
)
from .row import Floats, Row, case

_MAX = (
    "any kernel, stride, padding and dilation, ceil_mode, return_indices; NCHW and channels_last; of each output one byte saved; "
    "the gradient gathered, without atomics"
)
_MAX_FALLS_BACK = "a dilation larger than the image, with padding"
_AVERAGE = (
    "any kernel, stride and padding, ceil_mode, count_include_pad, divisor_override; NCHW and channels_last; nothing saved; "
    "the gradient gathered, without atomics"
)
_ADAPTIVE_AVERAGE = "any output_size; NCHW and channels_last; nothing saved; the gradient gathered, without atomics"
_ADAPTIVE_MAX = (
    "any output_size, return_indices; NCHW and channels_last; of each output one byte saved; the gradient gathered, "
    "without atomics"
)
_NOTHING = "nothing beyond the last row"

ROWS = (
    Row(
        "MaxPool1d",
        _MAX,
        _MAX_FALLS_BACK,
        operation=_max_pool1d,
        function="max_pool1d",
        functions=("max_pool1d_with_indices",),
        speeds={"audio, 64 x 256 x 4000": case(lambda nn: nn.MaxPool1d(4), (64, 256, 4000))},
        cases=dict(plain=case(lambda nn: nn.MaxPool1d(3, 2, padding=1), (2, 3, 11))),
    ),
    Row(
        "MaxPool2d",
        _MAX,
        _MAX_FALLS_BACK,
        operation=_max_pool2d,
        function="max_pool2d",
        functions=("max_pool2d_with_indices",),
        speeds={
            "ResNet stem, 64 images": case(lambda nn: nn.MaxPool2d(3, 2, 1), (64, 64, 112, 112)),
            "ResNet stem in channels_last": case(lambda nn: nn.MaxPool2d(3, 2, 1), Floats((64, 64, 112, 112), True)),
            "VGG 2x2, 32 images": case(lambda nn: nn.MaxPool2d(2), (32, 128, 112, 112)),
        },
        cases=dict(
            plain=case(lambda nn: nn.MaxPool2d(3, 2, padding=1), (2, 3, 7, 6)),
            indices=case(lambda nn: nn.MaxPool2d((2, 3), 3, dilation=(2, 1), return_indices=True), (5, 6, 7)),
            ceil=case(lambda nn: nn.MaxPool2d(3, 2, ceil_mode=True), (1, 2, 6, 6)),
            large=case(lambda nn: nn.MaxPool2d(6, 4, padding=3, dilation=2, return_indices=True), (1, 2, 14, 13)),
        ),
    ),
    Row(
        "MaxPool3d",
        _MAX,
        _MAX_FALLS_BACK,
        operation=_max_pool3d,
        function="max_pool3d",
        functions=("max_pool3d_with_indices",),
        speeds={"C3D, 8 clips": case(lambda nn: nn.MaxPool3d(2), (8, 128, 16, 56, 56))},
        cases=dict(
            plain=case(lambda nn: nn.MaxPool3d(2, padding=1), (1, 2, 3, 4, 5)),
            dilated=case(lambda nn: nn.MaxPool3d(2, 1, dilation=(2, 2, 3)), (1, 2, 3, 4, 5)),
        ),
    ),
    Row(
        "AvgPool1d",
        _AVERAGE,
        _NOTHING,
        operation=_avg_pool1d,
        function="avg_pool1d",
        speeds={"audio, 64 x 256 x 4000": case(lambda nn: nn.AvgPool1d(4), (64, 256, 4000))},
        cases=dict(plain=case(lambda nn: nn.AvgPool1d(3, 2, padding=1), (2, 3, 11))),
    ),
    Row(
        "AvgPool2d",
        _AVERAGE,
        _NOTHING,
        operation=_avg_pool2d,
        function="avg_pool2d",
        speeds={
            "DenseNet transition, 64 images": case(lambda nn: nn.AvgPool2d(2), (64, 128, 56, 56)),
            "Inception branch in channels_last": case(
                lambda nn: nn.AvgPool2d(3, 1, 1), Floats((64, 288, 35, 35), True)
            ),
        },
        cases=dict(
            plain=case(lambda nn: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), (2, 3, 7, 6)),
            padded=case(lambda nn: nn.AvgPool2d((3, 2), 2, padding=1, ceil_mode=True), (5, 6, 7)),
            divisor=case(lambda nn: nn.AvgPool2d(2, 3, divisor_override=3), (1, 2, 6, 8)),
        ),
    ),
    Row(
        "AvgPool3d",
        _AVERAGE,
        _NOTHING,
        operation=_avg_pool3d,
        function="avg_pool3d",
        speeds={"X3D, 8 clips": case(lambda nn: nn.AvgPool3d((1, 2, 2)), (8, 128, 16, 28, 28))},
        cases=dict(plain=case(lambda nn: nn.AvgPool3d(2, padding=1), (1, 2, 3, 4, 5))),
    ),
    Row(
        "AdaptiveAvgPool1d",
        _ADAPTIVE_AVERAGE,
        _NOTHING,
        operation=_adaptive_avg_pool1d,
        function="adaptive_avg_pool1d",
        speeds={"audio, 64 x 256 x 4000": case(lambda nn: nn.AdaptiveAvgPool1d(1), (64, 256, 4000))},
        cases=dict(plain=case(lambda nn: nn.AdaptiveAvgPool1d(5), (2, 3, 12))),
    ),
    Row(
        "AdaptiveAvgPool2d",
        _ADAPTIVE_AVERAGE,
        _NOTHING,
        operation=_adaptive_avg_pool2d,
        function="adaptive_avg_pool2d",
        speeds={
            "ResNet head, 256 images": case(lambda nn: nn.AdaptiveAvgPool2d(1), (256, 2048, 7, 7)),
            "ResNet head in channels_last": case(lambda nn: nn.AdaptiveAvgPool2d(1), Floats((256, 2048, 7, 7), True)),
            "squeeze and excitation, 64 images": case(lambda nn: nn.AdaptiveAvgPool2d(1), (64, 96, 56, 56)),
            "pyramid of 3 x 3, 16 images": case(lambda nn: nn.AdaptiveAvgPool2d(3), (16, 2048, 64, 64)),
        },
        cases=dict(
            plain=case(lambda nn: nn.AdaptiveAvgPool2d((3, 4)), (2, 3, 5, 9)),
            one=case(lambda nn: nn.AdaptiveAvgPool2d(1), (2, 3, 7, 6)),
            divides=case(lambda nn: nn.AdaptiveAvgPool2d((2, None)), (2, 3, 6, 4)),
            last=case(lambda nn: nn.AdaptiveAvgPool2d(1), Floats((2, 20, 7, 6), True)),
        ),
    ),
    Row(
        "AdaptiveAvgPool3d",
        _ADAPTIVE_AVERAGE,
        _NOTHING,
        operation=_adaptive_avg_pool3d,
        function="adaptive_avg_pool3d",
        speeds={"C3D head, 32 clips": case(lambda nn: nn.AdaptiveAvgPool3d(1), (32, 512, 4, 7, 7))},
        cases=dict(plain=case(lambda nn: nn.AdaptiveAvgPool3d(2), (1, 2, 3, 4, 5))),
    ),
    Row(
        "AdaptiveMaxPool1d",
        _ADAPTIVE_MAX,
        _NOTHING,
        operation=_adaptive_max_pool1d,
        function="adaptive_max_pool1d",
        functions=("adaptive_max_pool1d_with_indices",),
        speeds={"text, 64 x 256 x 512": case(lambda nn: nn.AdaptiveMaxPool1d(1), (64, 256, 512))},
        cases=dict(plain=case(lambda nn: nn.AdaptiveMaxPool1d(5), (2, 3, 12))),
    ),
    Row(
        "AdaptiveMaxPool2d",
        _ADAPTIVE_MAX,
        _NOTHING,
        operation=_adaptive_max_pool2d,
        function="adaptive_max_pool2d",
        functions=("adaptive_max_pool2d_with_indices",),
        speeds={
            "CBAM, 64 images": case(lambda nn: nn.AdaptiveMaxPool2d(1), (64, 256, 28, 28)),
            "VGG head, 64 images": case(lambda nn: nn.AdaptiveMaxPool2d(7), (64, 512, 16, 16)),
        },
        cases=dict(
            plain=case(lambda nn: nn.AdaptiveMaxPool2d((3, 4)), (2, 3, 5, 9)),
            one=case(lambda nn: nn.AdaptiveMaxPool2d(1, return_indices=True), (2, 3, 7, 6)),
            last=case(lambda nn: nn.AdaptiveMaxPool2d(1), Floats((2, 20, 7, 6), True)),
            indices=case(lambda nn: nn.AdaptiveMaxPool2d((2, None), return_indices=True), (2, 3, 6, 4)),
        ),
    ),
    Row(
        "AdaptiveMaxPool3d",
        _ADAPTIVE_MAX,
        _NOTHING,
        operation=_adaptive_max_pool3d,
        function="adaptive_max_pool3d",
        functions=("adaptive_max_pool3d_with_indices",),
        speeds={"C3D head, 32 clips": case(lambda nn: nn.AdaptiveMaxPool3d(1), (32, 512, 4, 7, 7))},
        cases=dict(plain=case(lambda nn: nn.AdaptiveMaxPool3d(2), (1, 2, 3, 4, 5))),
    ),
)

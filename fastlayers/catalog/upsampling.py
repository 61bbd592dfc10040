"""Upsampling."""

from ..ops.upsampling import _interpolate
from .row import Floats, Row, case

_SUPPORTS = (
    "modes nearest, nearest-exact, linear, bilinear, trilinear and area; size or scale_factor, align_corners; NCHW and "
    "channels_last; nothing saved; the gradient gathered, without atomics"
)
_FALLS_BACK = "mode bicubic or lanczos, antialias; the same or twice the size by another scale_factor than 1 or 2"

ROWS = (
    Row(
        "Upsample",
        _SUPPORTS,
        _FALLS_BACK,
        operation=_interpolate,
        function="interpolate",
        functions=("upsample", "upsample_bilinear", "upsample_nearest"),
        speeds={
            "U-Net nearest, 2x": case(lambda nn: nn.Upsample(scale_factor=2), (4, 640, 32, 32)),
            "U-Net nearest in channels_last, 2x": case(
                lambda nn: nn.Upsample(scale_factor=2), Floats((4, 640, 32, 32), True)
            ),
            "FPN bilinear in channels_last, 2x": case(
                lambda nn: nn.Upsample(scale_factor=2, mode="bilinear"), Floats((8, 256, 64, 64), True)
            ),
            "FPN bilinear, 2x": case(lambda nn: nn.Upsample(scale_factor=2, mode="bilinear"), (8, 256, 64, 64)),
            "segmentation, 19 classes to 512 x 1024": case(
                lambda nn: nn.Upsample((512, 1024), mode="bilinear"), (4, 19, 128, 256)
            ),
        },
        cases=dict(
            nearest=case(lambda nn: nn.Upsample(scale_factor=2), (2, 3, 4, 3)),
            bilinear=case(lambda nn: nn.Upsample(scale_factor=(2, 1.7), mode="bilinear"), (2, 3, 3, 4)),
            exact=case(lambda nn: nn.Upsample((5, 3), mode="nearest-exact"), (1, 2, 3, 5)),
            linear=case(lambda nn: nn.Upsample(7, mode="linear", align_corners=True), (2, 3, 4)),
            trilinear=case(lambda nn: nn.Upsample((2, 3, 5), mode="trilinear"), (1, 2, 3, 2, 4)),
        ),
    ),
    Row(
        "UpsamplingNearest2d",
        _SUPPORTS,
        _FALLS_BACK,
        operation=_interpolate,
        function="interpolate",
        speeds={"StyleGAN, 2x": case(lambda nn: nn.UpsamplingNearest2d(scale_factor=2), (16, 128, 64, 64))},
        cases=dict(plain=case(lambda nn: nn.UpsamplingNearest2d(scale_factor=3), (2, 3, 2, 3))),
    ),
    Row(
        "UpsamplingBilinear2d",
        _SUPPORTS,
        _FALLS_BACK,
        operation=_interpolate,
        function="interpolate",
        speeds={"U-Net, 2x": case(lambda nn: nn.UpsamplingBilinear2d(scale_factor=2), (4, 512, 32, 32))},
        cases=dict(plain=case(lambda nn: nn.UpsamplingBilinear2d(scale_factor=2), (2, 3, 3, 2))),
    ),
)

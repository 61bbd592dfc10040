"""Convolutions."""

from typing import Any

import torch

from ..fusion.conv import PATTERNS, applies_statistics
from ..fusion.plan import Role
from ..ops.conv import _conv1d, _conv2d, _conv3d
from ..ops.conv_transpose import _conv_transpose1d, _conv_transpose2d, _conv_transpose3d
from .row import Case, Cases, Row, case, round_robin

__all__ = ["PATTERNS", "ROWS", "TORCH_ROLES"]

TORCH_ROLES = {
    torch.nn.BatchNorm1d: Role("batch_norm", 1, joins=applies_statistics),
    torch.nn.BatchNorm2d: Role("batch_norm", 2, joins=applies_statistics),
    torch.nn.BatchNorm3d: Role("batch_norm", 3, joins=applies_statistics),
}
"""What layers of torch's own classes stand for."""


def _layer(batch: int, c: int, o: int, image: int, kernel: int, stride: int = 1, groups: int = 1) -> Case:
    def make(nn: Any) -> torch.nn.Module:
        return nn.Conv2d(c, o, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)

    return case(make, (batch, c, image, image))


# (channels in, out, image, kernel, stride): every distinct convolution of ResNet-50 v1.5, one of each sort first.
_RESNET_50 = (
    (64, 64, 56, 3, 1), (256, 64, 56, 1, 1), (256, 256, 14, 3, 1), (128, 128, 56, 3, 2),
    (3, 64, 224, 7, 2), (128, 128, 28, 3, 1), (512, 512, 7, 3, 1), (256, 256, 28, 3, 2), (512, 512, 14, 3, 2),
    (64, 64, 56, 1, 1), (64, 256, 56, 1, 1), (256, 128, 56, 1, 1),
    (128, 512, 28, 1, 1), (512, 128, 28, 1, 1), (512, 256, 28, 1, 1), (256, 1024, 14, 1, 1),
    (1024, 256, 14, 1, 1), (1024, 512, 14, 1, 1), (512, 2048, 7, 1, 1), (2048, 512, 7, 1, 1),
    (256, 512, 56, 1, 2), (512, 1024, 28, 1, 2), (1024, 2048, 14, 1, 2),
)  # fmt: skip


def _speeds() -> Cases:
    def resnet(batch: int) -> Cases:
        return {
            f"ResNet-50 {kernel}x{kernel}/{stride} {c}-{o} @{image}, batch {batch}": _layer(
                batch, c, o, image, kernel, stride
            )
            for c, o, image, kernel, stride in _RESNET_50
        }

    others: Cases = {}
    for c, image, kernel, stride in ((144, 56, 3, 1), (96, 56, 7, 1), (144, 56, 3, 2), (960, 7, 3, 1), (768, 7, 7, 1)):
        name = f"depthwise {kernel}x{kernel}/{stride} {c} @{image}, batch 32"
        others[name] = _layer(32, c, c, image, kernel, stride, c)
    networks: Cases = {}
    for c, o, image in ((128, 256, 56), (64, 64, 224), (512, 512, 28)):
        networks[f"VGG 3x3 {c}-{o} @{image}, batch 32"] = _layer(32, c, o, image, 3)
    for c, image in ((640, 32), (320, 64), (1280, 16)):
        networks[f"U-Net 3x3 {c} @{image}, batch 4"] = _layer(4, c, c, image, 3)
    for c, image in ((128, 56), (512, 14)):
        networks[f"ResNeXt 3x3 {c} in 32 groups @{image}, batch 32"] = _layer(32, c, c, image, 3, groups=32)
    return round_robin(resnet(32), resnet(256), others, networks, resnet(1))


def _signal(batch: int, c: int, o: int, length: int, kernel: int, **more: Any) -> Case:
    return case(lambda nn: nn.Conv1d(c, o, kernel, **more), (batch, c, length))


_SIGNALS = {
    "ResNet block of audio 3 128 @8192, batch 16": _signal(16, 128, 128, 8192, 3, padding=1),
    "depthwise 31 256 @1500 of a Conformer, batch 32": _signal(32, 256, 256, 1500, 31, padding=15, groups=256),
    "wav2vec 10/5 1-512 @80000, batch 8": _signal(8, 1, 512, 80000, 10, stride=5, bias=False),
    "Whisper 3/2 512 @3000, batch 8": _signal(8, 512, 512, 3000, 3, stride=2, padding=1),
    "WaveNet 3, dilation 64 64-128 @16000, batch 8": _signal(8, 64, 128, 16000, 3, dilation=64, padding=64),
    "depthwise 4 2048 @4096 of Mamba, batch 4": _signal(4, 2048, 2048, 4096, 4, padding=3, groups=2048),
    "HiFi-GAN 7 80-512 @1000, batch 16": _signal(16, 80, 512, 1000, 7, padding=3),
}


def _transposed(batch: int, c: int, o: int, image: int, kernel: int, **more: Any) -> Case:
    return case(lambda nn: nn.ConvTranspose2d(c, o, kernel, stride=2, **more), (batch, c, image, image))


_EMPTY = "a dimension of size 0 other than the batch"

ROWS = (
    Row(
        "Conv2d",
        "stride, padding (numbers, same, valid), dilation, groups, depthwise, the four padding modes, unbatched input, "
        "NCHW and channels_last with torch's rule for the result",
        _EMPTY,
        operation=_conv2d,
        function="conv2d",
        role=Role("conv", "conv2d"),
        lazy=True,
        speeds=_speeds(),
        cases=dict(
            three=case(lambda nn: nn.Conv2d(5, 18, 3, padding=1), (2, 5, 7, 6)),
            strided=case(lambda nn: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0)), (2, 4, 9, 7)),
            dilated=case(lambda nn: nn.Conv2d(3, 5, 3, stride=(1, 3), dilation=2, padding=2), (1, 3, 8, 10)),
            grouped=case(lambda nn: nn.Conv2d(6, 4, 3, groups=2, bias=False), (2, 6, 5, 5)),
            groups_of_two=case(lambda nn: nn.Conv2d(6, 3, 2, groups=3), (2, 6, 4, 3)),
            multiplied=case(lambda nn: nn.Conv2d(3, 6, 3, padding=1, groups=3), (2, 3, 4, 5)),
            depthwise=case(lambda nn: nn.Conv2d(5, 5, 3, padding=1, groups=5), (2, 5, 5, 4)),
            one=case(lambda nn: nn.Conv2d(17, 7, 1), (2, 17, 3, 4)),
            one_strided=case(lambda nn: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 5, 6)),
            same=case(lambda nn: nn.Conv2d(3, 4, (4, 2), padding="same", dilation=(1, 2)), (2, 3, 6, 5)),
            valid=case(lambda nn: nn.Conv2d(3, 4, 2, padding="valid"), (2, 3, 4, 4)),
            reflect=case(lambda nn: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 4, 5)),
            replicate=case(lambda nn: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="replicate"), (1, 2, 4, 5)),
            circular=case(lambda nn: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (1, 2, 4, 5)),
            unbatched=case(lambda nn: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 4)),
            whole_image=case(lambda nn: nn.Conv2d(3, 4, (4, 5)), (2, 3, 4, 5)),
        ),
    ),
    Row(
        "Conv1d",
        "as Conv2d, of signals: results are contiguous unless the weight's channels are",
        _EMPTY,
        operation=_conv1d,
        function="conv1d",
        role=Role("conv", "conv1d"),
        lazy=True,
        speeds=_SIGNALS,
        cases=dict(
            three=case(lambda nn: nn.Conv1d(5, 18, 3, padding=1), (2, 5, 19)),
            strided=case(lambda nn: nn.Conv1d(4, 6, 4, stride=3, padding=2, dilation=2), (2, 4, 23)),
            grouped=case(lambda nn: nn.Conv1d(6, 4, 3, groups=2, bias=False), (2, 6, 9)),
            depthwise=case(lambda nn: nn.Conv1d(5, 5, 4, padding=3, groups=5), (2, 5, 11)),
            one=case(lambda nn: nn.Conv1d(17, 7, 1), (2, 17, 9)),
            same=case(lambda nn: nn.Conv1d(3, 4, 4, padding="same"), (2, 3, 7)),
            circular=case(lambda nn: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (1, 2, 8)),
            unbatched=case(lambda nn: nn.Conv1d(3, 4, 3, padding=1), (3, 8)),
        ),
    ),
    Row(
        "ConvTranspose2d",
        "stride, padding, output_padding, output_size, dilation, groups, depthwise, unbatched input, NCHW and channels_last with "
        "torch's rule for the result",
        _EMPTY,
        operation=_conv_transpose2d,
        function="conv_transpose2d",
        role=Role("conv", "conv_transpose2d"),
        lazy=True,
        speeds={
            "U-Net 2x2/2 512-256 @32, batch 8": _transposed(8, 512, 256, 32, 2),
            "DCGAN 4x4/2 512-256 @8, batch 128": _transposed(128, 512, 256, 8, 4, padding=1, bias=False),
            "VAE 3x3/2 128-64 @64, batch 8": _transposed(8, 128, 64, 64, 3, padding=1, output_padding=1),
            "DCGAN 4x4/2 64-3 @32, batch 128": _transposed(128, 64, 3, 32, 4, padding=1, bias=False),
            "depthwise 4x4/2 256 @32, batch 32": _transposed(32, 256, 256, 32, 4, padding=1, groups=256, bias=False),
        },
        cases=dict(
            strided=case(lambda nn: nn.ConvTranspose2d(18, 5, 3, stride=2, padding=1), (2, 18, 4, 3)),
            # Its kernel is smaller than its stride: some pixels are the bias alone.
            padded=case(lambda nn: nn.ConvTranspose2d(4, 6, 2, (3, 2), 1, (2, 1)), (2, 4, 3, 5)),
            dilated=case(
                lambda nn: nn.ConvTranspose2d(3, 5, (3, 2), (1, 2), 2, dilation=(2, 3), bias=False), (1, 3, 5, 4)
            ),
            grouped=case(lambda nn: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 4, 3)),
            depthwise=case(lambda nn: nn.ConvTranspose2d(5, 5, 3, stride=2, groups=5), (2, 5, 4, 3)),
            one=case(lambda nn: nn.ConvTranspose2d(17, 7, 1), (2, 17, 3, 4)),
            unbatched=case(lambda nn: nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 4, 3)),
            then_relu=case(lambda nn: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=3), nn.ReLU()), (2, 3, 4, 3)),
        ),
    ),
    Row(
        "ConvTranspose1d",
        "as ConvTranspose2d, of signals: results are contiguous unless the weight's channels are",
        _EMPTY,
        operation=_conv_transpose1d,
        function="conv_transpose1d",
        role=Role("conv", "conv_transpose1d"),
        lazy=True,
        speeds={
            "HiFi-GAN 16/8 512-256 @1000, batch 16": case(
                lambda nn: nn.ConvTranspose1d(512, 256, 16, 8, padding=4), (16, 512, 1000)
            ),
            "HiFi-GAN 4/2 64-32 @64000, batch 16": case(
                lambda nn: nn.ConvTranspose1d(64, 32, 4, 2, padding=1), (16, 64, 64000)
            ),
        },
        cases=dict(
            strided=case(lambda nn: nn.ConvTranspose1d(18, 5, 5, stride=2, padding=1), (2, 18, 9)),
            padded=case(lambda nn: nn.ConvTranspose1d(4, 6, 3, 4, 1, 3, groups=2), (2, 4, 7)),
            unbatched=case(lambda nn: nn.ConvTranspose1d(3, 3, 4, groups=3, dilation=2), (3, 8)),
        ),
    ),
    Row(
        "Conv3d",
        "as Conv2d, of volumes: channels_last_3d with torch's rule for the result",
        _EMPTY,
        operation=_conv3d,
        function="conv3d",
        role=Role("conv", "conv3d"),
        lazy=True,
        speeds={
            "R3D 3x3x3 64 @8x56, batch 8": case(lambda nn: nn.Conv3d(64, 64, 3, padding=1), (8, 64, 8, 56, 56)),
            "R(2+1)D 3x1x1 144-64 @16x56, batch 4": case(
                lambda nn: nn.Conv3d(144, 64, (3, 1, 1), padding=(1, 0, 0)), (4, 144, 16, 56, 56)
            ),
            "U-Net 3x3x3/2 32-64 @64, batch 2": case(
                lambda nn: nn.Conv3d(32, 64, 3, stride=2, padding=1), (2, 32, 64, 64, 64)
            ),
            "patches 2x14x14 3-1152 @16x224, batch 2": case(
                lambda nn: nn.Conv3d(3, 1152, (2, 14, 14), stride=(2, 14, 14)), (2, 3, 16, 224, 224)
            ),
        },
        cases=dict(
            three=case(lambda nn: nn.Conv3d(3, 5, (2, 3, 3), padding=(0, 1, 1)), (1, 3, 3, 4, 3)),
            strided=case(lambda nn: nn.Conv3d(4, 6, 2, (1, 2, 3), 1, (2, 1, 1), 2), (2, 4, 3, 3, 4)),
            one=case(lambda nn: nn.Conv3d(16, 3, 1, bias=False), (2, 16, 2, 2, 3)),
            same=case(lambda nn: nn.Conv3d(2, 3, (2, 1, 4), padding="same"), (1, 2, 2, 3, 4)),
            replicate=case(lambda nn: nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"), (1, 2, 2, 3, 3)),
            unbatched=case(lambda nn: nn.Conv3d(2, 2, 2, groups=2), (2, 2, 3, 3)),
        ),
    ),
    Row(
        "ConvTranspose3d",
        "as ConvTranspose2d, of volumes: channels_last_3d with torch's rule for the result",
        _EMPTY,
        operation=_conv_transpose3d,
        function="conv_transpose3d",
        role=Role("conv", "conv_transpose3d"),
        lazy=True,
        speeds={
            "U-Net 2x2x2/2 128-64 @32, batch 2": case(
                lambda nn: nn.ConvTranspose3d(128, 64, 2, 2), (2, 128, 32, 32, 32)
            ),
        },
        cases=dict(
            strided=case(lambda nn: nn.ConvTranspose3d(4, 3, 3, 2, 1, 1), (1, 4, 2, 2, 3)),
            grouped=case(
                lambda nn: nn.ConvTranspose3d(4, 6, 2, (2, 1, 3), groups=2, dilation=(1, 2, 1)), (2, 4, 2, 3, 2)
            ),
            unbatched=case(lambda nn: nn.ConvTranspose3d(2, 3, 2, bias=False), (2, 2, 3, 2)),
        ),
    ),
)

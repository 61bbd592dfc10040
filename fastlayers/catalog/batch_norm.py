"""Normalisation of channels."""

import inspect
from typing import Any

import torch

from ..fusion.batch_norm import PATTERNS
from ..fusion.conv import normalized_dims
from ..fusion.plan import Role
from ..ops.batch_norm import _batch_norm, _group_norm, _instance_norm
from .row import Case, Cases, Row, case

__all__ = ["PATTERNS", "ROWS"]

_WEIGHTS = "with or without weight and bias; a 16-bit input with float32 weights"
_BATCH = (
    "training and eval, running statistics or none, momentum=None without waiting for the GPU; any strides, channels_last kept; "
    + _WEIGHTS
)
_INSTANCE = "with and without running statistics, unbatched input; any strides; " + _WEIGHTS
_BATCH_FALLS_BACK = (
    "running statistics that require grad, writing into a tensor whose elements share memory, an empty vector"
)
_INSTANCE_FALLS_BACK = _BATCH_FALLS_BACK + ", running statistics of no images"

_NO_BIAS: dict[str, Any] = dict(bias=False) if "bias" in inspect.signature(torch.nn.GroupNorm).parameters else {}
"""Of torch 2.13; older ones have a bias wherever they have a weight."""


def _groups(batch: int, channels: int, image: int) -> Case:
    return case(lambda nn: nn.GroupNorm(32, channels), (batch, channels, image, image))


def _norms(name: str, shapes: dict[str, tuple[int, ...]]) -> Cases:
    return {label: case(lambda nn, c=shape[1]: getattr(nn, name)(c), shape) for label, shape in shapes.items()}


_IMAGES = {
    "ResNet-50 256 @56, batch 32": (32, 256, 56, 56),
    "ResNet-50 64 @112, batch 32": (32, 64, 112, 112),
    "ResNet-50 512 @28, batch 32": (32, 512, 28, 28),
    "ResNet-50 512 @7, batch 32": (32, 512, 7, 7),
    "ResNet-18 64 @32, batch 8": (8, 64, 32, 32),
}
_VECTORS = {
    "4096 x 1024": (4096, 1024),
    "16384 x 2048": (16384, 2048),
    "8192 x 512": (8192, 512),
    "65536 x 256": (65536, 256),
    "128 x 256": (128, 256),
}
_VOLUMES = {
    "64 @8 x 56 x 56, batch 8": (8, 64, 8, 56, 56),
    "128 @8 x 28 x 28, batch 8": (8, 128, 8, 28, 28),
    "32 @64 x 64 x 64, batch 2": (2, 32, 64, 64, 64),
    "64 @32 x 32 x 32, batch 2": (2, 64, 32, 32, 32),
    "32 @128 x 128 x 128, batch 1": (1, 32, 128, 128, 128),
}
_STYLES = {
    "style transfer 128 @128, batch 4": (4, 128, 128, 128),
    "style transfer 32 @256, batch 4": (4, 32, 256, 256),
    "pix2pix 64 @128, batch 1": (1, 64, 128, 128),
    "pix2pix 128 @64, batch 1": (1, 128, 64, 64),
    "pix2pix 512 @16, batch 1": (1, 512, 16, 16),
}
_SEQUENCES = {
    "256 x 1024, batch 8": (8, 256, 1024),
    "256 x 16384, batch 8": (8, 256, 16384),
    "128 x 32768, batch 8": (8, 128, 32768),
    "64 x 65536, batch 8": (8, 64, 65536),
    "512 x 1024, batch 16": (16, 512, 1024),
}


def _eval(layer: Any) -> Any:
    """A layer in eval that has seen something."""
    with torch.no_grad():
        layer.running_mean.copy_(torch.linspace(-1, 1, layer.num_features))
        layer.running_var.copy_(torch.linspace(0.5, 2, layer.num_features))
    return layer.eval()


ROWS = (
    Row(
        "GroupNorm",
        "any number of groups, channels and pixels, any strides; " + _WEIGHTS,
        "nothing beyond the last row",
        operation=_group_norm,
        function="group_norm",
        role=Role("norm", "group_norm"),
        speeds={
            "U-Net 320 @64, batch 4": _groups(4, 320, 64),
            "U-Net 1280 @16, batch 4": _groups(4, 1280, 16),
            "VAE decoder 128 @512, batch 1": _groups(1, 128, 512),
            "U-Net 640 @32, batch 4": _groups(4, 640, 32),
            "ResNet-50 256 @56, batch 32": _groups(32, 256, 56),
        },
        cases=dict(
            images=case(lambda nn: nn.GroupNorm(2, 6), (3, 6, 5, 4)),
            before_gelu=case(lambda nn: nn.Sequential(nn.GroupNorm(2, 4), nn.GELU()), (2, 4, 5)),
            vectors=case(lambda nn: nn.GroupNorm(3, 18), (3, 18)),
            plain=case(lambda nn: nn.GroupNorm(1, 5, affine=False), (2, 5, 19)),
            no_bias=case(lambda nn: nn.GroupNorm(2, 4, eps=1e-3, **_NO_BIAS), (2, 4, 3, 3, 3)),
        ),
    ),
    Row(
        "BatchNorm1d",
        _BATCH,
        _BATCH_FALLS_BACK,
        operation=_batch_norm,
        function="batch_norm",
        role=Role("batch_norm", of=normalized_dims(1)),
        lazy=True,
        speeds=_norms("BatchNorm1d", _VECTORS),
        cases=dict(
            # Of layers with running statistics torch has no vmap, so that they don't come first.
            vectors=case(lambda nn: nn.BatchNorm1d(18, track_running_stats=False), (9, 18)),
            sequences=case(lambda nn: nn.BatchNorm1d(5, momentum=None, **_NO_BIAS), (3, 5, 7)),
            eval=case(lambda nn: _eval(nn.BatchNorm1d(5)), (3, 5, 7)),
            plain=case(lambda nn: nn.BatchNorm1d(3, affine=False), (4, 3)),
        ),
    ),
    Row(
        "BatchNorm2d",
        _BATCH,
        _BATCH_FALLS_BACK,
        operation=_batch_norm,
        function="batch_norm",
        role=Role("batch_norm", of=normalized_dims(2)),
        lazy=True,
        speeds=_norms("BatchNorm2d", _IMAGES),
        cases=dict(
            images=case(lambda nn: nn.BatchNorm2d(5, track_running_stats=False), (3, 5, 4, 6)),
            eval=case(lambda nn: _eval(nn.BatchNorm2d(3, affine=False)), (2, 3, 5, 4)),
            before_relu=case(lambda nn: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), (3, 3, 5, 4)),
            before_gelu=case(lambda nn: nn.Sequential(_eval(nn.BatchNorm2d(3)), nn.GELU()), (2, 3, 4, 3)),
        ),
    ),
    Row(
        "BatchNorm3d",
        _BATCH,
        _BATCH_FALLS_BACK,
        operation=_batch_norm,
        function="batch_norm",
        role=Role("batch_norm", of=normalized_dims(3)),
        lazy=True,
        speeds=_norms("BatchNorm3d", _VOLUMES),
        cases=dict(volumes=case(lambda nn: nn.BatchNorm3d(3, track_running_stats=False), (2, 3, 3, 2, 4))),
    ),
    Row(
        "SyncBatchNorm",
        "as BatchNorm2d, in eval and where there is one process",
        "training with several processes",
        speeds=_norms("SyncBatchNorm", _VECTORS),
        cases=dict(alone=case(lambda nn: nn.SyncBatchNorm(4), (3, 4, 5))),
    ),
    Row(
        "InstanceNorm1d",
        _INSTANCE,
        _INSTANCE_FALLS_BACK,
        operation=_instance_norm,
        function="instance_norm",
        role=Role("norm", "instance_norm"),
        lazy=True,
        speeds=_norms("InstanceNorm1d", _SEQUENCES),
        cases=dict(
            sequences=case(lambda nn: nn.InstanceNorm1d(5, affine=True), (3, 5, 19)),
            unbatched=case(lambda nn: nn.InstanceNorm1d(4), (4, 7)),
        ),
    ),
    Row(
        "InstanceNorm2d",
        _INSTANCE,
        _INSTANCE_FALLS_BACK,
        operation=_instance_norm,
        function="instance_norm",
        role=Role("norm", "instance_norm"),
        lazy=True,
        speeds=_norms("InstanceNorm2d", _STYLES),
        cases=dict(
            images=case(lambda nn: nn.InstanceNorm2d(3, affine=True), (2, 3, 5, 4)),
            eval=case(lambda nn: _eval(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)), (2, 3, 5, 4)),
        ),
    ),
    Row(
        "InstanceNorm3d",
        _INSTANCE,
        _INSTANCE_FALLS_BACK,
        operation=_instance_norm,
        function="instance_norm",
        role=Role("norm", "instance_norm"),
        lazy=True,
        speeds=_norms("InstanceNorm3d", _VOLUMES),
        cases=dict(volumes=case(lambda nn: nn.InstanceNorm3d(3), (2, 3, 3, 2, 4))),
    ),
)

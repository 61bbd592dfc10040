"""What the gradients of a convolution begin with: the gradient of what comes before its activation, and of its bias."""

from collections.abc import Sequence

import torch

from .. import epilogues
from ..reduce import activation_grad
from ..runtime import launch
from . import boxes
from .layout import as_matrix, is_channels_last, rows_follow
from .layout import channels_last as channels_last_copy


def reads_channels_last(dz: torch.Tensor, w_shape: Sequence[int], precision: str) -> bool:
    """Whether the gradients of a convolution with this weight (O, C/groups, R, S) are computed from a dz in channels_last,
    which is copied if it isn't."""
    channels = w_shape[0] * dz.element_size() % 16 == 0 and w_shape[1] > 1
    return channels and boxes.takes(dz, w_shape, precision)


def conv2d_output_grad(
    dy: torch.Tensor,
    saved: torch.Tensor | None,
    activation: epilogues.Activation | None,
    sums: torch.Tensor | None,
    *,
    channels_last: bool = False,
) -> torch.Tensor:
    """dz = f_grad(dy, saved) and its sums over images and pixels, in one pass over memory. Returns dz, which is dy if there
    is no activation.

    Shape: dy and saved (N, O, OH, OW) or (N, O, OD, OH, OW), any strides; the sums (O,).

    Args:
        saved, activation: None if there is no activation.
        sums: where to write the sums of dz over all dimensions but the second, or None.
        channels_last: whether dz has to be in channels_last, so that it is converted once for both kernels that read it.
    """
    if dy.dim() == 5:  # as images whose rows are planes
        planes = None if saved is None else saved.flatten(3)
        dz = conv2d_output_grad(dy.flatten(3), planes, activation, sums)
        return dy if saved is None else dz.unflatten(3, dy.shape[3:])
    n, o, h, w = dy.shape
    images = [dy] if saved is None else [dy, saved]
    if all(as_matrix(image) is not None for image in images):
        batch, pixels = 1, n * h * w
    else:
        batch, pixels = n, h * w
        images = [image if rows_follow(image) else image.contiguous() for image in images]
    dy_rows, *saved_rows = [image.permute(0, 2, 3, 1).reshape(batch, pixels, o) for image in images]
    if saved is None:
        activation_grad(dy_rows, None, None, None, sums)
        return channels_last_copy(dy) if channels_last and not is_channels_last(dy) else dy
    if channels_last:
        dz = launch.empty((batch, pixels, o), dtype=dy.dtype, device=dy.device)
    else:
        dz = launch.empty_like(saved_rows[0])
    activation_grad(dy_rows, saved_rows[0], activation, dz, sums)
    return dz.view(n, h, w, o).permute(0, 3, 1, 2)

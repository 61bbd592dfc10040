"""Normalisation."""

from ..fusion.norm import PATTERNS
from ..fusion.plan import Role
from ..ops.norm import _layer_norm, _rms_norm
from .row import Case, Row, case

__all__ = ["PATTERNS", "ROWS"]


def _layer(rows: int, size: int) -> Case:
    return case(lambda nn: nn.LayerNorm(size), (rows, size))


_MODELS = {
    "GPT-2, 8 x 1024 tokens": (8192, 768),
    "Llama-8B width, 8192 tokens": (8192, 4096),
    "ViT-B, 64 images": (64 * 197, 768),
    "BERT-large, 32 x 512 tokens": (16384, 1024),
    "width 8192, 4096 tokens": (4096, 8192),
    "narrow": (262144, 128),
    "ConvNeXt-T stage 1, 64 images": (64 * 56 * 56, 96),
    "GPT-2, 1 token": (1, 768),
    "odd 4097 x 1001": (4097, 1001),
    "very long rows": (1024, 65536),
}
_RMS_MODELS = {
    "Llama-8B, 8192 tokens": (8192, 4096),
    "Llama-8B, 1 token": (1, 4096),
    "heads of 128": (262144, 128),
    "odd 4097 x 1001": (4097, 1001),
    "very long rows": (1024, 65536),
}

ROWS = (
    Row(
        "LayerNorm",
        "any trailing dimensions and row length, any strides; with or without weight and bias; a 16-bit input with float32 "
        "weights; in `fuse`, the residual before it in the same pass",
        "nothing beyond the last row",
        operation=_layer_norm,
        scale=1,
        function="layer_norm",
        role=Role("layer_norm"),
        speeds={name: _layer(*sizes) for name, sizes in _MODELS.items()},
        cases=dict(
            rows=case(lambda nn: nn.LayerNorm(37), (9, 37)),
            several=case(lambda nn: nn.LayerNorm((3, 5)), (2, 4, 3, 5)),
            plain=case(lambda nn: nn.LayerNorm(7, elementwise_affine=False), (4, 7)),
            no_bias=case(lambda nn: nn.LayerNorm(18, eps=1e-3, bias=False), (5, 18)),
            one=case(lambda nn: nn.LayerNorm(1), (3, 1)),
            vector=case(lambda nn: nn.LayerNorm(23), (23,)),
        ),
    ),
    Row(
        "RMSNorm",
        "any trailing dimensions and row length, any strides but channels_last's; with or without weight, with torch's eps or "
        "one's own; in `fuse`, the residual before it in the same pass",
        "a weight of another dtype than the input's, an input in channels_last",
        operation=_rms_norm,
        scale=1,
        function="rms_norm",
        role=Role("rms_norm"),
        speeds={
            name: case(lambda nn, size=size: nn.RMSNorm(size), (rows, size))
            for name, (rows, size) in _RMS_MODELS.items()
        },
        cases=dict(
            rows=case(lambda nn: nn.RMSNorm(37), (9, 37)),
            several=case(lambda nn: nn.RMSNorm((3, 5)), (4, 3, 5)),
            plain=case(lambda nn: nn.RMSNorm(7, elementwise_affine=False), (4, 7)),
            eps=case(lambda nn: nn.RMSNorm(18, eps=1e-3), (5, 18)),
            two=case(lambda nn: nn.RMSNorm(2), (3, 2)),
            vector=case(lambda nn: nn.RMSNorm(23), (23,)),
        ),
    ),
)

"""Transformers."""

from typing import Any

from .row import Cases, Row, case

__all__ = ["ROWS"]

_ROWS_IN_ONE = (
    "Linear with relu or gelu in one kernel, a dropout with the residual and the norm that follow in one call, with norm_first "
    "or without; attention as MultiheadAttention"
)
_CHILD = "a child with a hook, a subclass or a forward of its own is called as it is"
_SIZES: dict[str, Any] = dict(d_model=8, nhead=2, dim_feedforward=19, dropout=0.0)


def _of(*layers: str, **options: Any) -> Cases:
    """A layer called with one input, or with one and an encoder's result."""
    (name,) = layers
    inputs = ((5, 2, 8), (3, 2, 8)) if "Decoder" in name else ((5, 2, 8),)
    make = lambda **more: case(lambda nn: getattr(nn, name)(**_SIZES, **more), *inputs)  # noqa: E731
    return dict(after=make(), first=make(norm_first=True, activation="gelu"), plain=make(bias=False), **options)


ROWS = (
    Row(
        "TransformerEncoderLayer",
        f"{_ROWS_IN_ONE}; in eval too, where torch has a path of its own",
        f"nested tensors, a method `_sa_block` or `_ff_block` of one's own; {_CHILD}",
        cases=_of("TransformerEncoderLayer"),
        speeds={},
    ),
    Row(
        "TransformerDecoderLayer",
        _ROWS_IN_ONE,
        f"a method `_sa_block`, `_mha_block` or `_ff_block` of one's own; {_CHILD}",
        cases=_of("TransformerDecoderLayer"),
        speeds={},
    ),
    Row(
        "TransformerEncoder",
        "its layers, and its norm",
        "in eval, padded sequences of which torch makes nested tensors",
        cases=dict(
            two=case(
                lambda nn: nn.TransformerEncoder(
                    nn.TransformerEncoderLayer(**_SIZES), 2, nn.LayerNorm(8), enable_nested_tensor=False
                ),
                (5, 2, 8),
            )
        ),
        speeds={},
    ),
    Row(
        "TransformerDecoder",
        "its layers, and its norm",
        "nothing beyond the last row",
        cases=dict(
            two=case(
                lambda nn: nn.TransformerDecoder(nn.TransformerDecoderLayer(**_SIZES), 2, nn.LayerNorm(8)),
                (5, 2, 8),
                (3, 2, 8),
            )
        ),
        speeds={},
    ),
    Row(
        "Transformer",
        "its encoder and its decoder",
        "nothing beyond the last row",
        cases=dict(
            both=case(
                lambda nn: nn.Transformer(**_SIZES, num_encoder_layers=1, num_decoder_layers=1, batch_first=True),
                (2, 3, 8),
                (2, 5, 8),
            )
        ),
        speeds={},
    ),
)

"""torch.nn.modules.activation."""

from typing import Any

import torch
from torch import nn

from .. import functional as F
from .._state import own
from ..ops import multi_head_attention as attention

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "GLU",
    "SELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "LogSoftmax",
    "Mish",
    "MultiheadAttention",
    "PReLU",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softmax2d",
    "Softmin",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Threshold",
]


class CELU(nn.CELU):
    """x, or alpha (exp(x / alpha) - 1) below 0. As torch.nn.CELU; see `fastlayers.functional.celu` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CELU.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.celu(input, self.alpha, self.inplace)


class ELU(nn.ELU):
    """x, or alpha (exp(x) - 1) below 0. As torch.nn.ELU; see `fastlayers.functional.elu` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ELU.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.elu(input, self.alpha, self.inplace)


class GELU(nn.GELU):
    """x times the probability that a standard normal variable is less than x, or an approximation of it by tanh. As
    torch.nn.GELU; see `fastlayers.functional.gelu` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GELU.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.gelu(input, approximate=self.approximate)


class Hardshrink(nn.Hardshrink):
    """x, or 0 between -lambd and lambd. As torch.nn.Hardshrink; see `fastlayers.functional.hardshrink` for shapes,
    dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardshrink.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.hardshrink(input, self.lambd)


class Hardsigmoid(nn.Hardsigmoid):
    """(x + 3) / 6 between 0 and 1. As torch.nn.Hardsigmoid; see `fastlayers.functional.hardsigmoid` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardsigmoid.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.hardsigmoid(input, self.inplace)


class Hardswish(nn.Hardswish):
    """x times its Hardsigmoid. As torch.nn.Hardswish; see `fastlayers.functional.hardswish` for shapes, dtypes and
    errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardswish.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.hardswish(input, self.inplace)


class Hardtanh(nn.Hardtanh):
    """x between two bounds. As torch.nn.Hardtanh; see `fastlayers.functional.hardtanh` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Hardtanh.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """x, or a slope times x below 0. As torch.nn.LeakyReLU; see `fastlayers.functional.leaky_relu` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LeakyReLU.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class LogSigmoid(nn.LogSigmoid):
    """log(1 / (1 + exp(-x))). As torch.nn.LogSigmoid; see `fastlayers.functional.logsigmoid` for shapes, dtypes and
    errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LogSigmoid.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.logsigmoid(input)


class Mish(nn.Mish):
    """x tanh(log(1 + exp(x))). As torch.nn.Mish; see `fastlayers.functional.mish` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Mish.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.mish(input, inplace=self.inplace)


class ReLU(nn.ReLU):
    """max(x, 0). As torch.nn.ReLU; see `fastlayers.functional.relu` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(input, inplace=self.inplace)


class ReLU6(nn.ReLU6):
    """x between 0 and 6. As torch.nn.ReLU6; see `fastlayers.functional.hardtanh` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.ReLU6.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class SELU(nn.SELU):
    """An ELU with a scale, under which layers normalise themselves. As torch.nn.SELU; see `fastlayers.functional.selu`
    for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.SELU.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.selu(input, self.inplace)


class SiLU(nn.SiLU):
    """x / (1 + exp(-x)). As torch.nn.SiLU; see `fastlayers.functional.silu` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.SiLU.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.silu(input, inplace=self.inplace)


class Sigmoid(nn.Sigmoid):
    """1 / (1 + exp(-x)). As torch.nn.Sigmoid; see `fastlayers.functional.sigmoid` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Sigmoid.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.sigmoid(input)


class Softplus(nn.Softplus):
    """log(1 + exp(beta x)) / beta. As torch.nn.Softplus; see `fastlayers.functional.softplus` for shapes, dtypes and
    errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Softplus.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softplus(input, self.beta, self.threshold)


class Softshrink(nn.Softshrink):
    """x moved by lambd towards 0. As torch.nn.Softshrink; see `fastlayers.functional.softshrink` for shapes, dtypes and
    errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Softshrink.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softshrink(input, self.lambd)


class Softsign(nn.Softsign):
    """x / (1 + abs(x)). As torch.nn.Softsign; see `fastlayers.functional.softsign` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Softsign.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softsign(input)


class Tanh(nn.Tanh):
    """The hyperbolic tangent. As torch.nn.Tanh; see `fastlayers.functional.tanh` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Tanh.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.tanh(input)


class Tanhshrink(nn.Tanhshrink):
    """x - tanh(x). As torch.nn.Tanhshrink; see `fastlayers.functional.tanhshrink` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Tanhshrink.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.tanhshrink(input)


class Threshold(nn.Threshold):
    """x, or a value where x is no more than a threshold. As torch.nn.Threshold; see `fastlayers.functional.threshold`
    for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Threshold.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.threshold(input, self.threshold, self.value, self.inplace)


class GLU(nn.GLU):
    """The first half of x along `dim`, times the sigmoid of the second. As torch.nn.GLU; see `fastlayers.functional.glu` for
    shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GLU.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.glu(input, self.dim)


class MultiheadAttention(nn.MultiheadAttention):
    """Attention of several heads between linear projections. As torch.nn.MultiheadAttention: `out_proj` lends its weight and
    bias and is never called. See `fastlayers.functional.multi_head_attention_forward` for shapes, dtypes and errors. In eval,
    where torch has an operator of its own for self-attention with batch_first, a query that may attend to no key gives NaN, as
    there.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:

        def reference() -> Any:
            return nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )

        if query.is_nested or key.is_nested or value.is_nested:
            return attention.left("nested tensors", reference)
        if self._in_one_operator(query, key, value, key_padding_mask, attn_mask):
            out = self.out_proj
            return attention.inference(
                query,
                attention.Parameters((self.in_proj_weight,), self.in_proj_bias, None, None, out.weight, out.bias),
                attention.Masks(key_padding_mask, attn_mask),
                attention.Way(self.num_heads, 0.0, False, False, bool(need_weights), bool(average_attn_weights)),
                reference,
            )
        batch_first = self.batch_first and query.dim() == 3
        if batch_first:  # what is one tensor stays one
            is_query, is_key = key is query, value is key
            query = query.transpose(1, 0)
            key = query if is_query else key.transpose(1, 0)
            value = key if is_key else value.transpose(1, 0)
        output, weights = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v,
            self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias, training=self.training,
            key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim, q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight, v_proj_weight=self.v_proj_weight, average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )  # fmt: skip
        return (output.transpose(1, 0), weights) if batch_first else (output, weights)

    def _in_one_operator(self, query: Any, key: Any, value: Any, *masks: Any) -> bool:
        """Whether torch's layer calls its operator for the whole of it, or may find more against it than is looked at here."""
        if self.training or not self.batch_first or query is not key or key is not value or query.dim() != 3:
            return False
        weight, bias, out = self.in_proj_weight, self.in_proj_bias, self.out_proj
        if weight is None or bias is None or self.num_heads % 2 or not weight.dtype == bias.dtype == query.dtype:
            return False
        if self.bias_k is not None or self.bias_v is not None or self.add_zero_attn or not self._qkv_same_embed_dim:
            return False
        if any([mask is not None and torch.is_floating_point(mask) for mask in masks]) or torch.is_autocast_enabled():
            return False
        if not torch.backends.mha.get_fastpath_enabled():
            return False
        used = (query, weight, bias, out.weight, out.bias)
        return not torch.is_grad_enabled() or not any([t is not None and t.requires_grad for t in used])


class PReLU(nn.PReLU):
    """x, or a learned slope times x below 0, one slope for all or one for each channel. As torch.nn.PReLU; see
    `fastlayers.functional.prelu` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.PReLU.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.prelu(input, own(self, "weight", PReLU))


class LogSoftmax(nn.LogSoftmax):
    """The logarithm of softmax along `dim`. As torch.nn.LogSoftmax; see `fastlayers.functional.log_softmax` for shapes, dtypes
    and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LogSoftmax.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)


class Softmax2d(nn.Softmax2d):
    """Softmax over the channels of images. As torch.nn.Softmax2d; see `fastlayers.functional.softmax` for dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Softmax2d.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dim() not in (3, 4):
            return super().forward(input)  # which raises
        return F.softmax(input, -3, _stacklevel=5)


class Softmin(nn.Softmin):
    """Softmax of -x along `dim`. As torch.nn.Softmin; see `fastlayers.functional.softmin` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Softmin.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softmin(input, self.dim, _stacklevel=5)


class Softmax(nn.Softmax):
    """Softmax along `dim`. As torch.nn.Softmax; see `fastlayers.functional.softmax` for shapes, dtypes and errors.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.Softmax.html
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softmax(input, self.dim, _stacklevel=6)

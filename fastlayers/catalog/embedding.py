"""Tables of which rows are looked up."""

from ..ops.embedding import _embedding
from .row import Classes, Row, case

ROWS = (
    Row(
        "Embedding",
        "indices of any shape, padding_idx, scale_grad_by_freq; a dense gradient, written once and in a fixed order",
        "max_norm, which writes into the weight; a sparse gradient; 2**31 indices and more",
        operation=_embedding,
        function="embedding",
        speeds={
            "GPT-2, 50257 x 768, 8192 tokens": case(lambda nn: nn.Embedding(50257, 768), Classes((8, 1024), 50257)),
            "Llama-3, 128256 x 4096, 8192 tokens": case(
                lambda nn: nn.Embedding(128256, 4096), Classes((8192,), 128256)
            ),
        },
        cases=dict(
            words=case(lambda nn: nn.Embedding(7, 5), Classes((3, 4), 7)),
            padding=case(lambda nn: nn.Embedding(5, 16, padding_idx=2), Classes((9,), 5)),
            common=case(lambda nn: nn.Embedding(3, 8), Classes((230,), 3)),
        ),
    ),
)

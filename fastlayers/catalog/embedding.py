"""Tables of which rows are looked up."""

from ..ops.embedding import _embedding, _embedding_bag
from .row import Classes, Offsets, Row, case

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
    Row(
        "EmbeddingBag",
        "sum and mean, offsets or bags of one length, per_sample_weights with their gradient, padding_idx, scale_grad_by_freq, "
        "include_last_offset, int32 and int64; a dense gradient, written once and in a fixed order",
        "the maximum of a bag; max_norm, which writes into the weight; a sparse gradient; 2**31 indices and more",
        operation=_embedding_bag,
        function="embedding_bag",
        speeds={
            "DLRM, 250000 x 128, 16384 bags of 32": case(
                lambda nn: nn.EmbeddingBag(250000, 128, mode="sum"), Classes((16384, 32), 250000)
            ),
            "words, 100000 x 512, 4096 weighted bags of 64": case(
                lambda nn: nn.EmbeddingBag(100000, 512, mode="sum"),
                Classes((2**18,), 100000),
                Offsets(tuple(range(0, 2**18, 64))),
                (2**18,),
            ),
            "words, 100000 x 304, mean of 4096 bags of 64": case(
                lambda nn: nn.EmbeddingBag(100000, 304), Classes((2**18,), 100000), Offsets(tuple(range(0, 2**18, 64)))
            ),
        },
        cases=dict(
            weights=case(lambda nn: nn.EmbeddingBag(7, 5, mode="sum"), Classes((11,), 7), Offsets((0, 3, 3, 8)), (11,)),
            padding=case(lambda nn: nn.EmbeddingBag(5, 16, padding_idx=2), Classes((9, 3), 5)),
            common=case(
                lambda nn: nn.EmbeddingBag(3, 8, include_last_offset=True),
                Classes((230,), 3),
                Offsets((0, 0, 70, 229, 230)),
            ),
        ),
    ),
)

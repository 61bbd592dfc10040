"""Linear layers."""

from ..fusion.linear import PATTERNS
from ..fusion.plan import Role
from ..ops.linear import _linear
from .row import Case, Cases, Row, case, round_robin

__all__ = ["PATTERNS", "ROWS"]


def _layer(rows: int, k: int, n: int) -> Case:
    return case(lambda nn: nn.Linear(k, n), (rows, k))


def _speeds() -> Cases:
    llama = dict(up=(4096, 14336), down=(14336, 4096), qkv=(4096, 6144), out=(4096, 4096))

    def tokens(*counts: int) -> Cases:
        return {
            f"Llama-8B {name}, {count} tokens": _layer(count, k, n)
            for count in counts
            for name, (k, n) in llama.items()
        }

    vit, mlp = {}, {}
    for images in (64, 1):
        vit[f"ViT-B up, {images} images"] = _layer(197 * images, 768, 3072)
        vit[f"ViT-B down, {images} images"] = _layer(197 * images, 3072, 768)
    for batch in (64, 8192, 1024, 256):
        mlp[f"MLP 784-512, batch {batch}"] = _layer(batch, 784, 512)
        mlp[f"MLP 512-10, batch {batch}"] = _layer(batch, 512, 10)
    odd = {
        f"odd {rows} x {k} x {n}": _layer(rows, k, n)
        for rows, k, n in ((4097, 1023, 1001), (1000, 1000, 1000), (333, 4095, 4097), (8191, 100, 7))
    }
    head = {"GPT-2 head, 1024 tokens": _layer(1024, 768, 50257)}
    return round_robin(tokens(4096), vit, mlp, head | odd, tokens(1, 64, 512))


ROWS = (
    Row(
        "Linear",
        "any leading dimensions, none, empty batch; with or without bias; any strides",
        "a bias that isn't (out_features,)",
        operation=_linear,
        function="linear",
        role=Role("linear"),
        lazy=True,
        speeds=_speeds(),
        cases=dict(
            matrix=case(lambda nn: nn.Linear(37, 19), (21, 37)),
            no_bias=case(lambda nn: nn.Linear(18, 33, bias=False), (3, 5, 18)),
            vector=case(lambda nn: nn.Linear(9, 5), (9,)),
            one_feature=case(lambda nn: nn.Linear(5, 1), (4, 5)),
            deep=case(lambda nn: nn.Linear(6, 4), (2, 1, 3, 2, 6)),
        ),
    ),
)

"""In the manner of a small GPT: attention by hand, a LayerNorm of the program's own, weights tied, gradients checkpointed."""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    vocabulary: int = 11
    width: int = 8
    heads: int = 2
    layers: int = 2
    block: int = 6


class LayerNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn, self.c_proj, self.heads = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width), c.heads
        self.register_buffer("mask", torch.tril(torch.ones(c.block, c.block)))

    def forward(self, x):
        b, t, w = x.shape
        q, k, v = (s.view(b, t, self.heads, -1).transpose(1, 2) for s in self.c_attn(x).split(w, dim=2))
        att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        att = F.softmax(att.masked_fill(self.mask[:t, :t] == 0, float("-inf")), dim=-1)
        return self.c_proj((att @ v).transpose(1, 2).reshape(b, t, w))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = LayerNorm(c.width), Attention(c), LayerNorm(c.width)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(c.width, 4 * c.width), c_proj=nn.Linear(4 * c.width, c.width)))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(c.vocabulary, c.width), nn.Embedding(c.block, c.width)
        self.h, self.ln_f = nn.ModuleList([Block(c) for _ in range(c.layers)]), LayerNorm(c.width)
        self.lm_head = nn.Linear(c.width, c.vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


torch.manual_seed(1337)
model = GPT(Config())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = torch.arange(40) % 11
for step in range(2):
    starts = torch.randint(len(data) - 7, (3,))
    x, y = (torch.stack([data[i + shift : i + shift + 6] for i in starts]) for shift in (0, 1))
    _, loss = model(x, y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    print(f"step {step} loss {loss.item():.3f}")
with torch.no_grad():
    idx = torch.zeros((1, 1), dtype=torch.long)
    for _ in range(3):
        idx = torch.cat((idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
print(idx.shape)

"""In the manner of a tutorial on autoencoders: containers, a loss of two terms, a copy of the model, a checkpoint file."""

import copy
import io
import sys

import torch
import torch.nn.functional as F
from torch import nn


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 8), nn.LeakyReLU(0.2), nn.BatchNorm1d(8))
        self.mu, self.logvar = nn.Linear(8, 2), nn.Linear(8, 2)
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 12), nn.Sigmoid())

    def forward(self, x):
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return self.decoder(z), mu, logvar


def loss_function(recon, x, mu, logvar):
    bce = F.binary_cross_entropy(recon, x, reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


torch.manual_seed(0)
x = torch.rand(10, 12)
model = VAE()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for step in range(3):
    optimizer.zero_grad()
    loss = loss_function(*([model(x)[0], x] + list(model(x)[1:])))
    loss.backward()
    optimizer.step()
    print(f"step {step} loss {loss.item():.3f}")
best = copy.deepcopy(model).eval()
file = io.BytesIO()
torch.save({"model": best.state_dict()}, file)
file.seek(0)
again = VAE()
again.load_state_dict(torch.load(file)["model"])
torch.manual_seed(2)
first = best(x)[0]
torch.manual_seed(2)
assert torch.equal(first, again.eval()(x)[0])
sys.exit(3)

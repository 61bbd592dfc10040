"""In the manner of a first tutorial: an MLP that tells small images apart, with a training loop and a test loop."""

import argparse

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 4)

    def forward(self, x):
        return F.log_softmax(self.head(self.layers(self.flatten(x))), dim=1)


def init_weights(m):
    if isinstance(m, nn.Linear):
        nn.init.kaiming_uniform_(m.weight)
        m.bias.data.fill_(0.01)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(1)
    labels = torch.arange(32) % 4
    images = torch.randn(4, 4, 4)[labels] + 0.1 * torch.randn(32, 4, 4)
    loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)
    model = Net(args.hidden)
    model.apply(init_weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(args.epochs):
        model.train()
        for data, target in loader:
            optimizer.zero_grad()
            loss = F.nll_loss(model(data), target)
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            output = model(images)
            print(f"epoch {epoch} loss {F.nll_loss(output, labels).item():.3f}")
    return model


if __name__ == "__main__":
    model = main()

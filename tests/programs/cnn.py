"""In the manner of an image tutorial: convolutions, pooling, a residual block of the program's own, and a scheduler."""

import torch
from torch import nn, optim
from torch.nn import BatchNorm2d, Conv2d, CrossEntropyLoss, Linear
from torch.nn.functional import max_pool2d, relu


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = Conv2d(channels, channels, 3, padding=1, bias=False), BatchNorm2d(channels)
        self.conv2, self.bn2 = Conv2d(channels, channels, 3, padding=1, bias=False), BatchNorm2d(channels)

    def forward(self, x):
        return relu(x + self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.fc = Conv2d(1, 4, 3, padding="same"), Block(4), Linear(16, 3)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(m.weight, 1)

    def forward(self, x):
        x = max_pool2d(relu(self.stem(x)), 2)
        x = max_pool2d(self.block(x), 2)
        return self.fc(torch.flatten(x, 1))


torch.manual_seed(0)
labels = torch.arange(8) % 3
images = torch.randn(3, 1, 8, 8)[labels] + 0.1 * torch.randn(8, 1, 8, 8)
model, criterion = ConvNet(), CrossEntropyLoss(label_smoothing=0.1)
optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
for step in range(3):
    optimizer.zero_grad()
    loss = criterion(model(images), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    print(f"step {step} loss {loss.item():.3f}")

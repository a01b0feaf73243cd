"""A small model with BatchNorm, dropout in every third and a residual connection, registered by its owner."""

import torch
from torch import Tensor, nn

from common.models import register_model


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.drop(self.norm(self.conv(x))))


class DropoutNet(nn.Module):
    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.Dropout(0.1))
        self.blocks = nn.Sequential(
            nn.ReLU(inplace=True), Residual(width), Residual(width), nn.Dropout2d(0.25), Residual(width)
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(width, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def wide_net(num_classes: int) -> DropoutNet:
    """Wide enough for a low rank to be fewer bytes."""
    return DropoutNet(num_classes, width=32)


register_model("dropout_net", DropoutNet)
register_model("wide_net", wide_net)

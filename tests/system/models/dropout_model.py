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
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Dropout(0.1))
        self.blocks = nn.Sequential(
            nn.ReLU(inplace=True), Residual(8), Residual(8), nn.Dropout2d(0.25), Residual(8)
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


register_model("dropout_net", DropoutNet)

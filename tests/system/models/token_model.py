"""A small transformer classifier with dropout in every third, registered by its owner; `[B,16,24]` crosses its cuts."""

import torch
from torch import Tensor, nn

from common.models import register_model


class Embed(nn.Module):
    def __init__(self, width: int, patches: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.place = nn.Parameter(torch.randn(1, patches, width) / 4)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.patch(x).flatten(2).transpose(1, 2).contiguous() + self.place)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(16, 16)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.narrow(self.drop(torch.relu(self.wide(self.norm2(x)))))


class Head(nn.Module):
    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(x).mean(1))


class TokenNet(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = Embed(24, 16)
        self.blocks = nn.Sequential(Block(24), Block(24))
        self.head = Head(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


register_model("token_net", TokenNet)

"""A small model of tokens, of which a mask rules some out, as padding of texts is; registered by its owner.

The tokens are an image's pixels, the dark ones are ruled out.
"""

import torch
from torch import Tensor, nn

from common.models import register_model


class MaskedNet(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        kept = pixels.select(2, 0) > 0
        h = self.embed(pixels)
        # As attention does, each token takes something of the others that are no padding.
        h = h + torch.where(kept.unsqueeze(2), self.first(h), 0.0).mean(1, keepdim=True)
        h = self.second(torch.relu(self.drop(h)))
        return self.head(torch.where(kept.unsqueeze(2), h, 0.0).sum(1) / 64)


register_model("masked_net", MaskedNet)

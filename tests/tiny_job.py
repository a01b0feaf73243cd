"""A job of two chunks of four samples a step, which takes milliseconds."""

import dropout_model  # noqa: F401  (registers its model)
from edge.config import TrainConfig

TINY_JOB = TrainConfig(
    server="nowhere:1",
    model="dropout_net",
    cuts=("stem", "blocks"),
    image_size=16,
    batch_size=8,
    chunks=2,
    train_limit=16,
    test_limit=8,
    memory_format="contiguous",
)

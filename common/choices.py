"""Options that both sides know by name, without torch, so that a wrong command line is answered at once."""

AMP = ("none", "bf16", "fp16")
COUNTINGS = ("true", "published")
MEMORY_FORMATS = ("auto", "contiguous", "channels_last")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "linear", "cosine", "polynomial")
PADDINGS = ("longest", "max")

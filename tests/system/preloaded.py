"""What every command loads, loaded as a command loads it; forked processes start with it."""

from common.runtime import prepare_process, set_threads

prepare_process()
set_threads(1)  # threads of torch's own would not survive the fork

import uvloop  # noqa: E402, F401
from sklearn.datasets import load_digits  # noqa: E402

import cloud.server  # noqa: E402, F401
import edge.command  # noqa: E402, F401
from common.bottleneck import with_bottleneck  # noqa: E402
from common.model_spec import ModelSpec  # noqa: E402
from common.models import build_model  # noqa: E402
from common.partition import image_input, split  # noqa: E402

load_digits()
_model = build_model(ModelSpec(name="squeezenet1_1", num_classes=10))
with_bottleneck(split(_model, ("features.2", "features.5"), image_input(64)), ("conv", ""), seed=0)

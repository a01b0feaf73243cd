"""torchvision, also where its native operators do not load.

The registry's torchvision is built against the registry's torch, which is the CUDA build. Next to a
CPU-only torch its library of native operators (``nms`` and the like) finds no CUDA runtime, so ``import
torchvision`` ends in ``RuntimeError: operator torchvision::nms does not exist``: it describes shapes of
operators that nothing has defined. Classifiers, data sets and transforms use none of them. This module
catches exactly that error, declares the missing operators' schemas (never their kernels: calling one still
fails), and imports again.

Everything else imports torchvision from here.
"""

import importlib
import re
import sys
from types import ModuleType

import torch

_MISSING_OPERATOR = re.compile(r"operator torchvision::(\w+) does not exist")

# The schemas that torchvision's csrc declares for the operators it describes unconditionally.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A torch Library takes its declarations back when it is collected.
_declared: list[torch.library.Library] = []


def _import_torchvision() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        missing = _MISSING_OPERATOR.search(str(error))
        if missing is None or missing[1] not in _SCHEMAS or _declared:
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    _declared.append(library)
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    return importlib.import_module("torchvision")


torchvision = _import_torchvision()
datasets = importlib.import_module("torchvision.datasets")
feature_extraction = importlib.import_module("torchvision.models.feature_extraction")
models = importlib.import_module("torchvision.models")
ops = importlib.import_module("torchvision.ops")
transforms = importlib.import_module("torchvision.transforms.v2")

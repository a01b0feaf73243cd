import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from common import vision


def test_a_fresh_import_gives_torchvision_without_a_warning():
    program = (
        "import common.vision as vision, torchvision\n"
        "assert torchvision is vision.torchvision and torchvision.ops is vision.ops\n"
        "print(vision.models.resnet18.__name__, vision.transforms.Resize.__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "resnet18 Resize\n", "")


def failing_first(message):
    """An import that fails once, then gives a module."""
    outcomes = iter([RuntimeError(message), ModuleType("torchvision")])

    def import_module(_name):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return import_module


@pytest.fixture
def broken(monkeypatch):
    """Sets torchvision up to be imported again, half imported already."""
    monkeypatch.setattr(vision, "_declared", [])
    loaded = {"torchvision": ModuleType("torchvision"), "torchvision.io": ModuleType("io"), "torch": torch}
    monkeypatch.setattr(vision, "sys", SimpleNamespace(modules=loaded))

    def fail(message):
        monkeypatch.setattr(vision.importlib, "import_module", failing_first(message))
        return loaded

    return fail


def test_missing_operators_are_declared_and_the_half_imported_modules_dropped(broken):
    loaded = broken("operator torchvision::nms does not exist")
    assert vision._import_torchvision().__name__ == "torchvision"
    assert list(loaded) == ["torch"]
    assert hasattr(torch.ops.torchvision, "nms")
    assert hasattr(torch.ops.torchvision, "qnms")


@pytest.mark.parametrize("message", ["operator torchvision::roi does not exist", "CUDA versions differ"])
def test_any_other_failure_of_the_import_is_not_hidden(broken, message):
    loaded = broken(message)
    with pytest.raises(RuntimeError, match=message):
        vision._import_torchvision()
    assert len(loaded) == 3

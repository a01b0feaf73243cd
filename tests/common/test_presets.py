import pytest
import torch
from torch import nn

from common.errors import UserError
from common.graph import find_cut, trace
from common.presets import generic_cuts, preset_cuts
from common.vision import models

# One of each family, and of each way that a family names its layers.
NAMES = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "swin_t",
    "swin_v2_t",
    "vgg11_bn",
    "vit_b_32",
    "wide_resnet50_2",
)


@pytest.mark.parametrize("name", [*NAMES, pytest.param("maxvit_t", marks=pytest.mark.slow)])
def test_a_familys_preset_names_operations_of_its_models_in_order(name):
    heads = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # A regnet computes its widths with tensors, which need data.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        traced = trace(models.get_model(name, weights=None, **heads), training=False)
    first, second = (find_cut(traced, cut) for cut in preset_cuts(name))
    assert first < second < len(traced.operations()) - 1


def test_every_torchvision_classifier_has_a_preset():
    assert all(len(preset_cuts(name)) == 2 for name in models.list_models(module=models))


def test_a_model_of_no_known_family_is_asked_for_its_cuts():
    with pytest.raises(UserError, match="no preset cuts for mine; name two with --cut"):
        preset_cuts("mine")


def classifier(*stem):
    return nn.Sequential(
        *stem,
        nn.ReLU(),
        nn.Conv2d(4, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(8, 2),
    )


def test_generic_cuts_are_after_the_first_normalization_and_before_pooling():
    model = classifier(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert preset_cuts("mine", model) == ("1", "3")


def test_generic_cuts_are_after_the_first_layer_where_nothing_is_normalized():
    assert generic_cuts(classifier(nn.Conv2d(3, 4, 3))) == ("0", "2")


def test_a_model_too_short_to_cut_is_refused():
    with pytest.raises(UserError, match="no good cut points are found in Sequential; name two with --cut"):
        generic_cuts(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))

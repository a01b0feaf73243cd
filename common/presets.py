"""Cut points that suit the well-known families: after the stem, and before the pooling and the classifier.

In a text encoder that is after the first layer's attention, and after the last layer.

The stem's map is large but its channels are few and cheap to make, and what comes before the classifier is
the smallest tensor of the model: together they leave nearly all the work in the middle and the labels on the
edge.
"""

import re

from torch import fx, nn

from common.errors import UserError
from common.graph import trace

# By the beginning of the name, the first that fits. Cut 1 is before the activation where there is one, as its
# sign then survives quantization by channel; cut 2 is before pooling, and in a vision transformer after the
# class token is taken out, the only one that the head looks at.
_PRESETS: tuple[tuple[str, tuple[str, str]], ...] = (
    (r"mobilenet_v2", ("features.0.1", "features.18")),
    (r"mobilenet_v3_small", ("features.0.1", "features.12")),
    (r"mobilenet_v3_large", ("features.0.1", "features.16")),
    (r"efficientnet_v2_s", ("features.0.1", "features.7")),
    (r"efficientnet_", ("features.0.1", "features.8")),
    (r"(wide_)?resne(x)?t\d+", ("bn1", "layer4")),
    (r"regnet_", ("stem.1", "trunk_output")),
    (r"densenet", ("features.norm0", "features")),
    (r"shufflenet", ("conv1.1", "conv5")),
    (r"mnasnet", ("layers.1", "layers")),
    (r"squeezenet", ("features.0", "features")),
    (r"(vgg|alexnet)", ("features.0", "features")),
    (r"googlenet", ("conv1.bn", "inception5b")),
    (r"inception_v3", ("Conv2d_1a_3x3.bn", "Mixed_7c")),
    (r"convnext", ("features.0", "features")),
    (r"swin", ("features.0", "permute")),
    (r"vit_", ("encoder.dropout", "getitem_5")),
    (r"maxvit", ("stem.0.1", "blocks")),
)


# What a classifier's end is made of: walking back from the output, cut 2 is before the first of these.
_TAIL_MODULES = (
    nn.Linear,
    nn.Dropout,
    nn.Flatten,
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.Tanh,
    nn.Hardswish,
    nn.SiLU,
    nn.Softmax,
    nn.LogSoftmax,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
_TAIL_OPERATIONS = re.compile(
    r"(flatten|mean|view|reshape|squeeze|dropout|adaptive_\w+_pool\w+|avg_pool\w+)(_\d+)?"
)
_NORMALIZATIONS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def preset_cuts(name: str, model: nn.Module | None = None) -> tuple[str, str]:
    """Return good cut points for a model.

    Args:
        name: the model's.
        model: the model itself, from which to find cut points where its family has no preset.

    Raises:
        UserError: the family has no preset, and there is no model or none are found in it.
    """
    if model is not None and hasattr(getattr(model, "config", None), "num_hidden_layers"):
        return encoder_cuts(model)
    for pattern, cuts in _PRESETS:
        if re.match(pattern, name):
            return cuts
    if model is None:
        raise UserError(f"there are no preset cuts for {name}; name two with --cut")
    return generic_cuts(model)


def generic_cuts(model: nn.Module) -> tuple[str, str]:
    """Find cut points in any classifier: after its first layer, and before what pools and classifies.

    A normalization right after the first layer goes with it.

    Raises:
        UserError: it is too short for that.
    """
    traced = trace(model, training=True)
    operations = traced.operations()
    last = len(operations) - 1
    while last > 0 and _is_tail(model, operations[last]):
        last -= 1
    first = next((i for i, node in enumerate(operations) if _has_parameters(model, node)), len(operations))
    if first + 1 < last and _is_module(model, operations[first + 1], _NORMALIZATIONS):
        first += 1
    if first >= last or last == len(operations) - 1:
        raise UserError(f"no good cut points are found in {type(model).__name__}; name two with --cut")
    return traced.names[operations[first].name], traced.names[operations[last].name]


def _is_module(model: nn.Module, node: fx.Node, kinds: tuple[type[nn.Module], ...]) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), kinds)


def _has_parameters(model: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and any(True for _ in model.get_submodule(str(node.target)).parameters())


def _is_tail(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _is_module(model, node, _TAIL_MODULES)
    return _TAIL_OPERATIONS.fullmatch(node.name) is not None


# The last child of a layer before its feed-forward part, the first that there is.
_ATTENTION_ENDS = ("sa_layer_norm", "post_attention_layernorm", "attention", "attn", "self_attn")


def encoder_cuts(model: nn.Module) -> tuple[str, str]:
    """Find an encoder's cut points: after the attention of its first layer, and after its last layer.

    Raises:
        UserError: it has no list of layers, or they have no attention.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            children = dict(module[0].named_children())
            end = next((name for name in _ATTENTION_ENDS if name in children), None)
            if end is not None:
                return f"{path}.0.{end}", path
    raise UserError(f"no good cut points are found in {type(model).__name__}; name two with --cut")

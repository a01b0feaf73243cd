import pytest
import torch
from torch import nn

from common import models
from common.errors import UserError
from common.model_spec import ModelSpec
from common.models import build_model, default_image_size, list_models, register_model
from common.vision import models as vision_models
from common.weights import save_model, state_digest


def small(**fields):
    return ModelSpec(**{"name": "squeezenet1_1", "num_classes": 10} | fields)


@pytest.fixture(autouse=True)
def no_lasting_registration(monkeypatch):
    monkeypatch.setattr(models, "_registered", {})


def test_a_model_is_a_pure_function_of_its_spec():
    first = build_model(small(seed=3)).state_dict()
    torch.rand(5)
    assert state_digest(build_model(small(seed=3)).state_dict()) == state_digest(first)
    assert state_digest(build_model(small(seed=4)).state_dict()) != state_digest(first)


def test_building_leaves_the_default_generator_alone():
    torch.manual_seed(11)
    build_model(small())
    drawn = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(3))


def test_every_torchvision_classifier_is_known():
    assert set(vision_models.list_models(module=vision_models)) == set(list_models())
    assert "mobilenet_v2" in list_models()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mobilenet_v2", 224),
        ("inception_v3", 299),
        ("efficientnet_b3", 300),
        ("efficientnet_v2_s", 384),
        ("vit_h_14", 224),
        ("maxvit_t", 224),
    ],
)
def test_the_default_image_size_is_the_models_own(name, size):
    assert default_image_size(name) == size


def test_the_default_image_size_follows_named_weights():
    assert default_image_size("vit_h_14", "IMAGENET1K_SWAG_E2E_V1") == 518
    assert default_image_size("vit_h_14", "somewhere/model.safetensors") == 224


def test_an_unknown_model_gets_its_nearest_names():
    with pytest.raises(UserError, match=r"unknown model .resnet19.; close names: .*resnet18.* lists all"):
        build_model(small(name="resnet19"))
    with pytest.raises(UserError, match=r"unknown model 'zzz'; there are alexnet, .*, vit_l_32"):
        default_image_size("zzz")


def test_unknown_weights_get_the_names_that_exist():
    with pytest.raises(UserError, match="no weights 'IMAGENET22K'; there are DEFAULT, IMAGENET1K_V1"):
        build_model(small(weights="IMAGENET22K"))


@pytest.mark.parametrize(
    "fields", [{"num_classes": 0}, {"num_classes": 10**9}, {"image_size": -1}, {"image_size": 10**6}]
)
def test_sizes_out_of_all_proportion_are_refused(fields):
    with pytest.raises(UserError, match=r"must be from 1 to \d+, not -?\d+"):
        build_model(small(**fields))


def test_an_image_size_that_a_model_cannot_have_is_refused():
    with pytest.raises(UserError, match="vit_b_32 cannot be built for 33 px"):
        build_model(ModelSpec(name="vit_b_32", num_classes=2, image_size=33))


def test_a_registered_model_is_built_by_its_name():
    register_model("two_layers", lambda num_classes: nn.Linear(4, num_classes))
    assert build_model(small(name="two_layers", num_classes=3)).out_features == 3
    assert "two_layers" in list_models()
    assert default_image_size("two_layers") == 224


def test_a_taken_name_cannot_be_registered_again():
    register_model("mine", nn.Identity)
    register_model("mine", nn.Identity)
    for name in ("mine", "resnet18"):
        with pytest.raises(UserError, match="is taken"):
            register_model(name, nn.Linear)


def test_a_state_dict_file_is_loaded_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    state = build_model(small(seed=5)).state_dict()
    save_model(path, state, {"bottleneck.cut1.encoder.0.weight": torch.ones(1)}, {})
    loaded = build_model(small(weights=str(path)))
    assert state_digest(loaded.state_dict()) == state_digest(state)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_another_number_of_classes_renews_the_last_layer_only(tmp_path, name):
    path = tmp_path / "model.pt"
    state = build_model(small(name=name, num_classes=7, seed=5)).state_dict()
    torch.save(state, path)
    loaded = build_model(small(name=name, weights=str(path))).state_dict()
    fresh = build_model(small(name=name)).state_dict()
    renewed = [key for key in state if state[key].shape != loaded[key].shape]
    assert len({key.rpartition(".")[0] for key in renewed}) == 1
    assert all(torch.equal(loaded[key], fresh[key] if key in renewed else state[key]) for key in loaded)


def test_a_state_dict_of_another_model_is_refused_by_what_differs(tmp_path):
    state = build_model(small()).state_dict()
    state["extra.weight"] = torch.ones(1)
    del state["features.0.bias"]
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"it lacks features\.0\.bias; it has besides extra\.weight"):
        build_model(small(weights=str(tmp_path / "model.pt")))


def test_a_state_dict_of_other_widths_is_refused_by_its_shapes(tmp_path):
    state = build_model(small()).state_dict()
    state["features.0.weight"] = torch.zeros(64, 1, 3, 3)
    torch.save(state, tmp_path / "model.pt")
    message = r"features\.0\.weight is \(64, 1, 3, 3\) there and \(64, 3, 3, 3\) here \(1 tensors differ\)"
    with pytest.raises(UserError, match=message):
        build_model(small(weights=str(tmp_path / "model.pt")))


@pytest.fixture
def published(monkeypatch):
    """Gives torchvision's named weights without a download: those of a random model."""

    def state_of(self, *_args, **_kwargs):
        assert self.url.startswith("https://")
        return build_model(ModelSpec(name="squeezenet1_1", num_classes=1000, seed=9)).state_dict()

    monkeypatch.setattr(vision_models.WeightsEnum, "get_state_dict", state_of)
    return build_model(ModelSpec(name="squeezenet1_1", num_classes=1000, seed=9)).state_dict()


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"])
def test_named_weights_are_torchvisions(published, name):
    loaded = build_model(small(num_classes=1000, weights=name))
    assert state_digest(loaded.state_dict()) == state_digest(published)


def test_named_weights_keep_all_but_the_classifier_for_other_classes(published):
    loaded = build_model(small(weights="DEFAULT")).state_dict()
    differing = [name for name in published if not torch.equal(loaded[name], published[name])]
    assert {name.rpartition(".")[0] for name in differing} == {"classifier.1"}


def test_weights_that_cannot_be_fetched_say_where_they_are(monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(vision_models.WeightsEnum, "get_state_dict", fail)
    with pytest.raises(UserError, match=r"could not be fetched \(no route to host\); download https://"):
        build_model(small(weights="DEFAULT"))


def test_the_heads_that_only_train_are_left_out(monkeypatch):
    # Its published first weights take seconds to draw, and are not the point here.
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: nn.init.normal_(tensor))
    model = build_model(ModelSpec(name="googlenet", num_classes=3))
    assert isinstance(model(torch.zeros(2, 3, 32, 32)), torch.Tensor)
    assert not any(name.startswith("aux") for name in model.state_dict())

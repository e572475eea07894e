"""Networks: published parameter counts, shapes, initialisation, and the user's own builder."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from llp import registry
from llp.errors import SpecError
from llp.workloads import build

SHAPE = {"channels": 3, "image_size": 32, "num_classes": 10}


def count(name, options=None, **shape):
    with torch.device("meta"):
        model = build(name, options or {}, **{**SHAPE, **shape})
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "num_classes", "expected"),
    [
        # He et al. 2016, table 6 says 0.27 M; 269,722 with shortcuts that have no parameters.
        ("resnet20", {}, 10, 269_722),
        # The usual CIFAR versions of torchvision's ImageNet networks.
        ("resnet18", {}, 10, 11_173_962),
        ("resnet34", {}, 10, 21_282_122),
        ("resnet50", {}, 10, 23_520_842),
        # Zagoruyko & Komodakis 2016, tables 4 and 5: 2.7 M (WRN-16-4), 8.9 M, 11.0 M, 36.5 M.
        ("wide_resnet", {}, 10, 2_748_890),
        ("wide_resnet", {"depth": 40}, 10, 8_949_210),
        ("wide_resnet", {"widen_factor": 8}, 10, 10_961_370),
        ("wide_resnet", {"depth": 28, "widen_factor": 10}, 100, 36_536_884),
    ],
)
def test_parameter_counts_are_the_published_ones(name, options, num_classes, expected):
    assert count(name, options, num_classes=num_classes) == expected


def by_hand_vgg(planes, batch_norm, channels=3, num_classes=10):
    total, before = 0, channels
    for after in planes:
        total += 9 * before * after + (2 * after if batch_norm else after)
        before = after
    return total + (before + 1) * num_classes


PLANES = {
    "vgg11": (64, 128, 256, 256, 512, 512, 512, 512),
    "vgg16": (64, 64, 128, 128, 256, 256, 256, *(512,) * 6),
}


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn", "vgg16", "vgg16_bn"])
def test_vgg_counts_are_those_of_the_papers_columns(name):
    depth, batch_norm = name.removesuffix("_bn"), name.endswith("_bn")
    assert count(name) == by_hand_vgg(PLANES[depth], batch_norm)
    if not batch_norm:  # torchvision's features have the same columns
        with torch.device("meta"):
            features = getattr(torchvision_models, depth)(init_weights=False).features
        assert count(name) == sum(p.numel() for p in features.parameters()) + 513 * 10


def test_small_networks_have_the_counts_worked_out_by_hand():
    assert count("mlp", {"width": 100, "depth": 2}) == 3072 * 100 + 100 + 100 * 101 + 101 * 10
    assert count("mlp", {"depth": 0}) == 3073 * 10
    convolutions = (27 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 128
    assert count("simple_cnn") == convolutions + (16 * 128 + 1) * 512 + 513 * 10
    norms = 2 * (32 + 64 + 128)
    assert count("convnet") == 27 * 32 + 9 * 32 * 64 + 9 * 64 * 128 + norms + 129 * 10


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_deep_residual_networks_are_torchvisions_but_for_the_stem(name):
    with torch.device("meta"):
        reference = getattr(torchvision_models, name)(num_classes=10)
    shapes = sorted(tuple(p.shape) for p in reference.parameters())
    shapes.remove((64, 3, 7, 7))
    with torch.device("meta"):
        ours = sorted(tuple(p.shape) for p in build(name, {}, **SHAPE).parameters())
    ours.remove((64, 3, 3, 3))
    assert ours == shapes


def test_resnet18_computes_what_torchvisions_network_with_that_stem_computes():
    reference = torchvision_models.resnet18(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    ours = build("resnet18", {}, **SHAPE)
    # Both list their tensors stem, blocks, classifier, so they can be copied in order.
    values = list(reference.state_dict().values())
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    batch = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(batch), reference.eval()(batch))


def test_resnet20_shortcuts_subsample_and_pad_with_zero_channels():
    model = build("resnet20", {}, **SHAPE).eval()
    block = model[6]  # 3 modules of stem, 3 blocks, then the first block of stage 2
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        batch = torch.rand(2, 16, 8, 8)
        out = block(batch)
    assert torch.equal(out[:, 8:24], batch[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() + out[:, 24:].abs().sum() == 0


@pytest.mark.parametrize("depth", [4, 11, 12, 17])
def test_wide_resnet_refuses_impossible_depths(depth):
    with pytest.raises(SpecError, match=r"depth must be 10, 16, 22, 28"):
        build("wide_resnet", {"depth": depth}, **SHAPE)


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
def test_vgg_names_the_sizes_when_images_are_too_small(name):
    with pytest.raises(SpecError, match=rf"{name} .* at least 32x32 pixels, not 28x28"):
        build(name, {}, channels=1, image_size=28, num_classes=10)


def test_images_below_eight_pixels_are_refused():
    with pytest.raises(SpecError, match="at least 8 pixels, not 7"):
        build("convnet", {}, channels=1, image_size=7, num_classes=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widht": 8}, "unknown option of convnet 'widht'; did you mean 'width'?"),
        ({"width": 0}, "width must be a whole number of at least 1, not 0"),
        ({"width": 8.0}, "width must be a whole number"),
        ({"width": "8"}, "width must be a whole number"),
        ({"width": True}, "width must be a whole number"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), not 1.0"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(SpecError, match=message.replace("?", r"\?")):
        build("convnet", options, **SHAPE)


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(SpecError, match="unknown model 'resnet21'; did you mean 'resnet20'"):
        build("resnet21", {}, **SHAPE)


def test_dropout_reaches_the_network():
    for name in ("mlp", "simple_cnn", "convnet", "vgg11", "wide_resnet"):
        with torch.device("meta"):
            modules = list(build(name, {"dropout": 0.25}, **SHAPE).modules())
        assert {m.p for m in modules if isinstance(m, nn.Dropout)} == {0.25}, name


def test_initial_activations_keep_their_scale_without_batch_norm():
    # He initialisation: the signal neither dies nor explodes over 13 convolutions.
    torch.manual_seed(0)
    with torch.no_grad():
        logits = build("vgg16", {}, **SHAPE)(torch.randn(16, 3, 32, 32))
    assert 0.1 < float(logits.std()) < 10


def test_the_same_seed_gives_the_same_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build("convnet", {}, **SHAPE).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("my_package_for_models")
    monkeypatch.setitem(sys.modules, "my_package_for_models", module)
    return module


def test_a_builder_from_outside_gets_the_arguments_it_accepts(user_module):
    def build_model(num_classes, hidden=5):
        return nn.Sequential(nn.Flatten(), nn.Linear(192, hidden), nn.Linear(hidden, num_classes))

    user_module.build_model = build_model
    model = build(
        "my_package_for_models:build_model",
        {"hidden": 7},
        channels=3,
        image_size=8,
        num_classes=4,
    )
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert model[1].out_features == 7
    with pytest.raises(SpecError, match="'hiden'; did you mean 'hidden'"):
        build("my_package_for_models:build_model", {"hiden": 7}, **SHAPE)


def test_a_builder_from_outside_with_keyword_arguments_gets_everything(user_module):
    seen = {}

    def build_model(**keywords):
        seen.update(keywords)
        return nn.Identity()

    user_module.build_model = build_model
    build("my_package_for_models:build_model", {"x": 1}, **SHAPE)
    assert seen == {**SHAPE, "x": 1}


def test_a_builder_from_outside_must_return_a_module(user_module):
    user_module.build_model = lambda: "no"
    with pytest.raises(SpecError, match=r"returned str instead of a torch\.nn\.Module"):
        build("my_package_for_models:build_model", {}, **SHAPE)


def test_options_of_a_builder_from_outside_are_read_from_its_signature(user_module):
    def build_model(*, channels, width=3):
        return nn.Identity()

    user_module.build_model = build_model
    assert "width" in registry.options("models", "my_package_for_models:build_model")

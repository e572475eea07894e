"""Every row of the dataset, model and augmentation tables through one life cycle."""

from __future__ import annotations

import inspect
import pickle

import numpy as np
import pytest
import test_workloads_files as files
import torch
from torch.nn import functional

from llp import registry
from llp.errors import SpecError
from llp.spec.schema import DatasetSpec
from llp.workloads import ImageData, build, load
from llp.workloads.batches import Batches, fixed_batches
from llp.workloads.subsets import nested_order

NARROW = {
    "mlp": {"width": 32},
    "resnet18": {"width": 8},
    "resnet34": {"width": 8},
    "resnet50": {"width": 8},
    "wide_resnet": {"widen_factor": 1},
}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Makes the files that a dataset needs and returns its section of an experiment."""

    def prepare(name):
        options = {}
        if name in {"cifar10", "cifar100"}:
            files.write_cifar(tmp_path, monkeypatch, name)
        elif name in {"mnist", "fashion_mnist"}:
            files.write_mnist(tmp_path, name, count=60)
        elif name == "image_folder":
            files.write_image_folder(tmp_path)
            options = {"image_size": 16}
        elif name == "synthetic":
            options = {"num_train": 100, "num_test": 20}
        return DatasetSpec(name=name, root=str(tmp_path), options=options)

    return prepare


def parameters_of(table, name):
    return inspect.signature(registry.load(table, name)).parameters


@pytest.mark.parametrize("table", ["datasets", "models"])
def test_options_in_the_table_are_the_keyword_arguments_and_defaults_of_the_target(table):
    given = {
        "datasets": {"root", "download"},
        "models": {"channels", "image_size", "num_classes"},
    }[table]
    for name, entry in registry.TABLES[table].items():
        parameters = parameters_of(table, name)
        assert given <= set(parameters), name
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values()), name
        defaults = {key: p.default for key, p in parameters.items() if key not in given}
        assert defaults == dict(entry.options), name


@pytest.mark.parametrize("name", registry.DATASETS)
def test_every_dataset_loads_splits_and_batches(name, prepared):
    spec = prepared(name)
    data = load(spec, seed=0)
    assert isinstance(data, ImageData)
    assert data.name == name
    assert data.source
    classes = set(range(data.num_classes))
    assert set(data.train.labels.tolist()) == classes
    for split in (data.train, data.validation, data.test):
        assert split.labels.dtype == np.int64
        assert split.images.dtype == np.uint8
        assert split.images.shape == (len(split), data.channels, data.image_size, data.image_size)
        assert set(split.labels.tolist()) <= classes
        assert len(split) > 0
    assert len(data.mean) == len(data.std) == data.channels
    assert load(spec, seed=0).digest == data.digest
    data = pickle.loads(pickle.dumps(data.without_test()))
    subset = nested_order(data.train.labels, seed=0)[: 2 * data.num_classes]
    options = {"mean": data.mean, "std": data.std}
    batches = Batches(data.train, subset, batch_size=4, shuffle=True, **options)
    images, _ = next(iter(batches.epoch(0)))
    assert images.shape == (4, data.channels, data.image_size, data.image_size)
    assert images.dtype == torch.float32
    everything = torch.cat([x for x, _ in fixed_batches(data.train, None, 64, **options)])
    assert everything.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (everything.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("name", registry.DATASETS)
def test_every_dataset_refuses_options_it_does_not_have(name):
    with pytest.raises(SpecError, match="no_such_option"):
        load(DatasetSpec(name=name, options={"no_such_option": 1}), seed=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", registry.MODELS)
def test_every_model_maps_images_of_any_size_to_logits(name, channels):
    shape = {"channels": channels, "num_classes": 7}
    with torch.device("meta"):
        for image_size in (8, 13, 32, 40):
            if name.startswith("vgg") and image_size < 32:
                with pytest.raises(SpecError, match="at least 32x32"):
                    build(name, {}, image_size=image_size, **shape)
                continue
            model = build(name, {}, image_size=image_size, **shape).train()
            logits = model(torch.empty(2, channels, image_size, image_size))
            assert logits.shape == (2, 7), image_size


@pytest.mark.parametrize("name", registry.MODELS)
def test_every_model_learns_one_small_batch_and_every_parameter_has_a_gradient(name):
    torch.manual_seed(0)
    size = 32 if name.startswith("vgg") else 8
    model = build(name, NARROW.get(name, {}), channels=1, image_size=size, num_classes=4)
    images, labels = torch.randn(4, 1, size, size), torch.arange(4)
    slow = name in {"vgg11", "vgg16"}  # deep without batch norm: larger steps diverge
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4 if slow else 1e-3)
    losses: list[float] = []
    while len(losses) < 20 and (not losses or losses[-1] > 0.7 * losses[0]):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert losses or not dead
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] <= 0.7 * losses[0]


@pytest.mark.parametrize("name", registry.MODELS)
def test_every_model_can_be_saved_and_loaded_bit_for_bit(name, tmp_path):
    shape = {"channels": 1, "image_size": 32, "num_classes": 3}
    options = NARROW.get(name, {})
    model, other = (build(name, options, **shape).eval() for _ in range(2))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    batch = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(batch), other(batch))


@pytest.mark.parametrize("name", registry.MODELS)
def test_every_option_of_every_model_is_used(name):
    shape = {"channels": 3, "image_size": 32, "num_classes": 10}

    def described(options):
        with torch.device("meta"):
            return str(build(name, options, **shape))

    changed = {"width": 24, "depth": 22, "widen_factor": 3, "dropout": 0.3}
    for option in registry.MODELS[name].options:
        assert described({option: changed[option]}) != described({}), option


@pytest.mark.parametrize("name", registry.AUGMENTATIONS)
def test_every_augmentation_works_in_batches(name, prepared):
    data = load(prepared("synthetic"), seed=0)
    options = {"batch_size": 32, "mean": data.mean, "std": data.std}
    augment = registry.load("augmentations", name)
    plain = torch.cat([x for x, _ in Batches(data.train, **options).epoch(0)])
    changed = torch.cat(
        [x for x, _ in Batches(data.train, augmentation=(augment,), **options).epoch(0)]
    )
    assert changed.shape == plain.shape
    assert changed.dtype == plain.dtype
    assert not torch.equal(changed, plain)
    assert torch.isfinite(changed).all()

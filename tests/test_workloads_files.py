"""Datasets in files: torchvision's layout, parquet, image folders, and what damage is called."""

from __future__ import annotations

import io
import json
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision import datasets as torchvision_datasets
from torchvision.datasets.utils import calculate_md5

from llp.errors import DataError, SpecError
from llp.spec.schema import DatasetSpec
from llp.workloads import folder, load, parquet
from llp.workloads.batches import Batches
from llp.workloads.datasets import cifar10, cifar100, fashion_mnist, image_folder, mnist
from llp.workloads.images import FileImages
from llp.workloads.official import standard_names

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def some_images(count, channels=3, side=32, classes=10, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    return images, np.arange(count) % classes


def encode(image, form="PNG"):
    buffer = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write_parquet(
    path, images, labels, *, image="image", label="label", struct=False, metadata=None, form="PNG"
):
    """One parquet file in the common layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [one if one is None or isinstance(one, bytes) else encode(one, form) for one in images]
    if struct:
        values = [{"bytes": value, "path": f"{i}.png"} for i, value in enumerate(values)]
    labels = [None if one is None else int(one) for one in labels]
    table = pa.table({"index": list(range(len(values))), image: values, label: labels})
    pq.write_table(table.replace_schema_metadata(metadata), path)


def write_cifar(root, monkeypatch, name="cifar10", count=20):
    """Tiny files in torchvision's CIFAR layout; its md5 lists are set to theirs."""
    cls = torchvision_datasets.CIFAR10 if name == "cifar10" else torchvision_datasets.CIFAR100
    classes, label_key = (10, "labels") if name == "cifar10" else (100, "fine_labels")
    place = root / cls.base_folder
    place.mkdir(parents=True)
    written = {}
    lists = {"train_list": [], "test_list": []}
    for key, split in lists.items():
        parts = []
        for seed, (filename, _) in enumerate(getattr(cls, key)):
            number = count if name == "cifar10" else 10 * count
            images, labels = some_images(number, classes=classes, seed=seed + len(key))
            content = {"data": images.reshape(number, -1), label_key: labels.tolist()}
            (place / filename).write_bytes(pickle.dumps(content))
            split.append([filename, calculate_md5(str(place / filename))])
            parts.append((images, labels))
        written[key] = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        monkeypatch.setattr(cls, key, split)
    meta = place / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: [f"class {c}" for c in range(classes)]}))
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": calculate_md5(str(meta))})
    return written["train_list"], written["test_list"]


def write_mnist(root, name="mnist", count=40):
    """Tiny files in torchvision's MNIST layout."""
    place = root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw"
    place.mkdir(parents=True)
    written = []
    for prefix, seed in (("train", 0), ("t10k", 1)):
        images, labels = some_images(count, channels=1, side=28, seed=seed)
        header = np.array([0x00000803, count, 28, 28], dtype=">u4").tobytes()
        (place / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x00000801, count], dtype=">u4").tobytes()
        content = header + labels.astype(np.uint8).tobytes()
        (place / f"{prefix}-labels-idx1-ubyte").write_bytes(content)
        written.append((images, labels))
    return written


def write_image_folder(root, per_class=6, side=16, channels=3, classes=("cat", "dog", "eel")):
    for split, seed in (("train", 0), ("test", 1)):
        images, _ = some_images(per_class * len(classes), channels, side, seed=seed)
        for index, image in enumerate(images):
            place = root / split / classes[index % len(classes)]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index:03d}.png").write_bytes(encode(image))


def same(raw, train, test):
    assert np.array_equal(raw.train_images, train[0])
    assert np.array_equal(raw.train_labels, train[1])
    assert np.array_equal(raw.test_images, test[0])
    assert np.array_equal(raw.test_labels, test[1])


# --- torchvision's files ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "loader"), [("cifar10", cifar10), ("cifar100", cifar100)])
def test_cifar_is_read_from_torchvisions_files(tmp_path, monkeypatch, name, loader):
    train, test = write_cifar(tmp_path, monkeypatch, name)
    raw = loader(root=tmp_path)
    same(raw, train, test)
    assert raw.class_names[3] == "class 3"
    assert "torchvision" in raw.source
    inner = tmp_path / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    same(loader(root=inner), train, test)


@pytest.mark.parametrize(("name", "loader"), [("mnist", mnist), ("fashion_mnist", fashion_mnist)])
def test_mnist_is_read_from_torchvisions_files_with_one_channel(tmp_path, name, loader):
    train, test = write_mnist(tmp_path, name)
    raw = loader(root=tmp_path)
    same(raw, train, test)
    assert raw.train_images.shape == (40, 1, 28, 28)
    assert len(raw.class_names) == 10


def test_an_altered_cifar_file_is_named(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    damaged = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"data_batch_3 is truncated or altered .*download: true"):
        cifar10(root=tmp_path)
    damaged.unlink()
    with pytest.raises(DataError, match="data_batch_3 is missing"):
        cifar10(root=tmp_path)


def test_a_truncated_mnist_file_is_an_error_that_names_the_folder(tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"mnist: incomplete or damaged: .*MNIST/raw"):
        mnist(root=tmp_path)
    file.unlink()
    with pytest.raises(DataError, match="train-images-idx3-ubyte is missing"):
        mnist(root=tmp_path)


@pytest.mark.parametrize("loader", [cifar10, cifar100, mnist, fashion_mnist])
def test_missing_data_are_never_downloaded_unasked_and_the_message_says_what_to_do(
    tmp_path, monkeypatch, loader
):
    def refuse(self):
        raise AssertionError("tried to download")

    for cls in (torchvision_datasets.CIFAR10, torchvision_datasets.MNIST):
        monkeypatch.setattr(cls, "download", refuse)
    with pytest.raises(DataError) as caught:
        loader(root=tmp_path / "nowhere")
    message = str(caught.value)
    for part in (
        loader.__name__,
        str(tmp_path / "nowhere"),
        "no such folder",
        "dataset.download: true",
        "torchvision's",
        "parquet",
        "image (or img)",
    ):
        assert part in message


def test_a_failed_download_is_an_error_with_its_reason(tmp_path, monkeypatch):
    def unreachable(self):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision_datasets.CIFAR10, "download", unreachable)
    with pytest.raises(DataError, match=r"download failed .*no route to host"):
        cifar10(root=tmp_path, download=True)


def test_download_when_asked_for_uses_torchvision(tmp_path, monkeypatch):
    def deliver(self):
        if not Path(self.root, self.base_folder).exists():
            deliver.written = write_cifar(Path(self.root), monkeypatch)

    monkeypatch.setattr(torchvision_datasets.CIFAR10, "download", deliver)
    raw = cifar10(root=tmp_path, download=True)
    same(raw, *deliver.written)


# --- parquet ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train_file", "test_file"),
    [
        ("cifar10_train.parquet", "cifar10_test.parquet"),
        ("cifar10-train.parquet", "cifar10-test.parquet"),
        ("train.parquet", "test.parquet"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("train-00000-of-00001-0ab1.parquet", "test-00000-of-00001-9fe2.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"),
        ("cifar10/train.parquet", "cifar10/test.parquet"),
        ("cifar10/data/train-00000-of-00001.parquet", "cifar10/data/test-00000-of-00001.parquet"),
    ],
)
@pytest.mark.parametrize("columns", [("image", False), ("img", True)])
def test_parquet_is_found_in_every_common_place_and_read_to_the_exact_pixels(
    tmp_path, train_file, test_file, columns
):
    train, test = some_images(20), some_images(10, seed=1)
    for file, split in ((train_file, train), (test_file, test)):
        write_parquet(tmp_path / file, *split, image=columns[0], struct=columns[1])
    (tmp_path / "train_notes.parquet").write_bytes(b"not a part of the split")
    raw = cifar10(root=tmp_path)
    same(raw, train, test)
    assert "PNG" in raw.source
    assert raw.train_labels.dtype == np.int64


def test_several_files_of_a_split_are_read_in_the_order_of_their_names(tmp_path):
    train, test = some_images(30), some_images(10, seed=1)
    for part in (2, 0, 1):
        rows = slice(10 * part, 10 * part + 10)
        name = f"train-0000{part}-of-00003.parquet"
        write_parquet(tmp_path / "data" / name, train[0][rows], train[1][rows])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", *test)
    same(cifar10(root=tmp_path), train, test)
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"part 1 of 3 is missing from .*data"):
        cifar10(root=tmp_path)


def test_files_named_after_the_dataset_win_over_general_names(tmp_path):
    train, test = some_images(20), some_images(10, seed=1)
    other = some_images(20, seed=2)
    write_parquet(tmp_path / "cifar10_train.parquet", *train)
    write_parquet(tmp_path / "cifar10_test.parquet", *test)
    for name in ("train.parquet", "test.parquet", "cifar100_train.parquet"):
        write_parquet(tmp_path / name, *other)
    same(cifar10(root=tmp_path), train, test)


def test_cifar100_takes_the_fine_labels(tmp_path):
    images, labels = some_images(200, classes=100)
    for split in ("train", "test"):
        path = tmp_path / f"cifar100_{split}.parquet"
        write_parquet(path, images, labels, image="img", label="fine_label")
        table = pq.read_table(path)
        coarse = pa.array([int(label) // 5 for label in labels])
        pq.write_table(table.add_column(0, "coarse_label", coarse), path)
    assert np.array_equal(cifar100(root=tmp_path).train_labels, labels)


@pytest.mark.parametrize("form", ["hub", "plain", "broken"])
def test_class_names_come_from_the_metadata_or_are_the_known_ones(tmp_path, form):
    names = [f"thing {c}" for c in range(10)]
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
    metadata = {
        "hub": {"huggingface": json.dumps(features)},
        "plain": {"class_names": json.dumps(names)},
        "broken": {"huggingface": "{not json"},
    }[form]
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", *some_images(20), metadata=metadata)
    data = load(DatasetSpec(name="cifar10", root=str(tmp_path)), seed=0)
    known = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    assert list(data.class_names) == (known if form == "broken" else names)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_names_for_files_without_names_are_those_of_files_that_have_them(name, shared_data):
    metadata = pq.read_schema(shared_data / f"{name}_test.parquet").metadata
    assert list(standard_names(name)) == json.loads(metadata[b"class_names"])


def test_grey_parquet_images_have_one_channel(tmp_path):
    images, labels = some_images(20, channels=1, side=28)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"fashion_mnist_{split}.parquet", images, labels)
    same(fashion_mnist(root=tmp_path), (images, labels), (images, labels))


def test_a_missing_test_split_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", *some_images(20))
    with pytest.raises(DataError, match=r"found .*train\.parquet but no test split"):
        cifar10(root=tmp_path)


def damaged(kind):
    images, labels = some_images(20)
    images, labels = [encode(image) for image in images], labels.tolist()
    if kind == "image":
        images[7] = images[7][: len(images[7]) // 2]
    elif kind == "not an image":
        images[7] = b"hello"
    elif kind == "null image":
        images[7] = None
    elif kind == "null label":
        labels[7] = None
    elif kind == "label":
        labels[7] = 10
    elif kind == "negative label":
        labels[7] = -1
    elif kind == "size":
        images[7] = encode(some_images(1, side=16)[0][0])
    elif kind == "grey":
        images[7] = encode(some_images(1, channels=1)[0][0])
    return images, labels


@pytest.mark.parametrize("struct", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("image", "cannot decode the image"),
        ("not an image", "cannot decode the image"),
        ("null image", "the image is null"),
        ("null label", "the label is null"),
        ("label", "the label is 10, outside 0..9"),
        ("negative label", "the label is -1, outside 0..9"),
        ("size", "the image is 16x16, the first one 32x32"),
        ("grey", r"an image of mode L where 3 channel\(s\) are expected"),
    ],
)
def test_a_damaged_row_is_named_with_its_file(tmp_path, kind, message, struct):
    write_parquet(tmp_path / "train.parquet", *damaged(kind), struct=struct)
    write_parquet(tmp_path / "test.parquet", *some_images(10))
    with pytest.raises(DataError, match=rf"train\.parquet, row 7: {message}"):
        cifar10(root=tmp_path)


def test_a_truncated_parquet_file_is_named(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", *some_images(20))
    file = tmp_path / "test.parquet"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"test\.parquet: truncated, or not a parquet file"):
        cifar10(root=tmp_path)


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", *some_images(20), image="picture")
    with pytest.raises(DataError, match=r"no column named image or img; it has .*picture"):
        cifar10(root=tmp_path)


def test_another_dataset_under_the_general_name_is_noticed(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", *some_images(20, channels=1, side=8))
    with pytest.raises(DataError, match="train images are 1x8x8, expected 1x28x28"):
        mnist(root=tmp_path)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", *some_images(20, classes=6))
    with pytest.raises(DataError, match="the training set holds 6 of 10 classes"):
        cifar10(root=tmp_path)


# --- image folders ---------------------------------------------------------------------------


def test_an_image_folder_has_its_sub_folders_as_classes(tmp_path):
    write_image_folder(tmp_path)
    (tmp_path / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    raw = image_folder(root=tmp_path, image_size=16)
    assert raw.class_names == ("cat", "dog", "eel")
    assert np.bincount(raw.train_labels).tolist() == [6, 6, 6]
    cats = some_images(18, 3, 16)[0][::3]  # written in turn: cat, dog, eel, cat, ...
    assert np.array_equal(raw.train_images[:6], cats)


def test_grey_folders_have_one_channel_and_mixed_ones_three(tmp_path):
    write_image_folder(tmp_path, channels=1)
    assert image_folder(root=tmp_path, image_size=16).train_images.shape[1] == 1
    write_image_folder(tmp_path, classes=("cat",), channels=3)
    assert image_folder(root=tmp_path, image_size=16).train_images.shape[1] == 3


def test_images_of_other_sizes_are_resized_and_centre_cropped(tmp_path):
    write_image_folder(tmp_path, side=16)
    wide = np.zeros((40, 80, 3), dtype=np.uint8)
    wide[:, 20:60] = 200  # the centre square
    Image.fromarray(wide).save(tmp_path / "train" / "cat" / "000.png")
    raw = image_folder(root=tmp_path, image_size=16)
    assert raw.train_images.shape == (18, 3, 16, 16)
    assert (raw.train_images[0, :, :, 1:-1] == 200).all()  # the filter reaches over the edge
    assert (raw.train_images[0] > 150).all()


def test_images_that_do_not_fit_stay_in_files_and_give_the_same_data(tmp_path, monkeypatch):
    write_image_folder(tmp_path)
    spec = DatasetSpec(name="image_folder", root=str(tmp_path), options={"image_size": 16})
    eager = load(spec, seed=0)
    monkeypatch.setattr(folder, "EAGER_BYTES", 100)
    lazy = pickle.loads(pickle.dumps(load(spec, seed=0)))
    assert isinstance(lazy.train.images, FileImages)
    assert (lazy.channels, lazy.image_size, lazy.num_classes) == (3, 16, 3)
    assert lazy.train.images.nbytes == eager.train.images.nbytes
    np.testing.assert_allclose((lazy.mean, lazy.std), (eager.mean, eager.std), rtol=1e-12)
    for one, other in ((eager.train, lazy.train), (eager.validation, lazy.validation)):
        options = {"batch_size": 4, "mean": eager.mean, "std": eager.std, "shuffle": True}
        pairs = zip(
            Batches(one, **options).epoch(1), Batches(other, **options).epoch(1), strict=True
        )
        for (x, y), (u, v) in pairs:
            assert torch.equal(x, u)
            assert torch.equal(y, v)


@pytest.mark.parametrize("eager_bytes", [0, 10**9])
def test_a_damaged_image_file_is_named(tmp_path, monkeypatch, eager_bytes):
    monkeypatch.setattr(folder, "EAGER_BYTES", eager_bytes)
    write_image_folder(tmp_path)
    (tmp_path / "train" / "dog" / "zzz.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"train/dog/zzz\.jpg: cannot read this image"):
        image_folder(root=tmp_path)


def test_a_file_that_vanishes_or_is_cut_short_after_the_check_is_named(tmp_path):
    write_image_folder(tmp_path)
    images = FileImages(str(tmp_path), ("train/cat/000.png", "train/cat/003.png"), 16, 3)
    file = tmp_path / "train" / "cat" / "003.png"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match=r"cat/003\.png: cannot read this image"):
        images.decode([0, 1])
    file.unlink()
    with pytest.raises(DataError, match=r"cat/003\.png: cannot read this image"):
        images.decode([1])


def test_a_folder_of_another_layout_is_refused_with_the_expected_one(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*train; expected .*train/<class>/<image>"):
        image_folder(root=tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="a sub-folder per class, at least two"):
        image_folder(root=tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(DataError, match=r"no images in .*train/cat"):
        image_folder(root=tmp_path)
    write_image_folder(tmp_path, classes=("cat", "dog"))
    (tmp_path / "test" / "fox").mkdir()
    with pytest.raises(DataError, match=r"class 'fox' is in .*test but not in .*train"):
        image_folder(root=tmp_path)
    with pytest.raises(SpecError, match=r"needs dataset\.root"):
        image_folder()
    with pytest.raises(SpecError, match="image_size must be at least 8, not 4"):
        image_folder(root=tmp_path, image_size=4)


# --- the real thing --------------------------------------------------------------------------

real = pytest.mark.skipif(
    not (SHARED / "cifar10_test.parquet").is_file(), reason=f"no CIFAR parquet files in {SHARED}"
)


@real
def test_real_cifar10_test_images_are_the_pixels_of_their_rows():
    files = parquet.find(SHARED, "cifar10", "test")
    assert [file.name for file in files] == ["cifar10_test.parquet"]
    split = parquet.read(files, channels=3, num_classes=10)
    assert split.images.shape == (10_000, 3, 32, 32)
    assert np.bincount(split.labels).tolist() == [1_000] * 10
    assert split.class_names[3] == "cat"
    assert split.encoding == "JPEG"
    table = pq.read_table(files[0], columns=["image", "label"])
    for row in (0, 1, 4_321, 9_999):
        image = Image.open(io.BytesIO(table["image"][row].as_py()))
        for x, y in ((0, 0), (31, 0), (0, 31), (7, 21)):
            assert tuple(split.images[row, :, y, x]) == image.getpixel((x, y))
        assert split.labels[row] == table["label"][row].as_py()


@real
@pytest.mark.slow
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_cifar_loads_in_full_with_the_known_statistics(name, classes):
    data = load(DatasetSpec(name=name, root=str(SHARED)), seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (42_500, 7_500, 10_000)
    assert set(np.bincount(data.train.labels)) == {42_500 // classes}
    assert (data.num_classes, data.channels, data.image_size) == (classes, 3, 32)
    known = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}
    np.testing.assert_allclose(data.mean, known[name], atol=3e-3)

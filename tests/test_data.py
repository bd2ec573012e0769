"""The data sets: what each holds, how it is split, and every refusal."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastensdistill.data import Dataset, Split, load_dataset
from fastensdistill.errors import InputError
from tests.compare import check_close


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- sources


def same(a: Split, images: np.ndarray, labels: np.ndarray) -> None:
    assert a.images.dtype == np.uint8
    assert a.labels.dtype == np.int64
    np.testing.assert_array_equal(a.images, images)
    np.testing.assert_array_equal(a.labels, labels)


def test_digits():
    from sklearn.datasets import load_digits

    data = load_dataset("digits", seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (300, 300, 1197)
    assert data.classes == tuple("0123456789")
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, (8, 8))
    assert set(data.train.labels.tolist()) == set(range(10))

    scans = load_digits()
    ours = np.concatenate([data.train.images, data.validation.images, data.test.images])[..., 0]
    labels = np.concatenate([data.train.labels, data.validation.labels, data.test.labels])
    assert (ours.min(), ours.max()) == (0, 255)
    order = np.random.default_rng(20220617).permutation(1797)  # the order is part of the set: results depend on it
    np.testing.assert_array_equal(np.rint(ours * (16 / 255)), scans.images[order])
    np.testing.assert_array_equal(labels, scans.target[order])
    same(load_dataset("digits", seed=2).train, data.train.images, data.train.labels)


def test_measured_statistics_are_of_the_training_split():
    data = load_dataset("digits", limit=100)
    pixels = data.train.images.astype(np.float64) / 255
    assert data.mean == (round(float(pixels.mean()), 4),)
    assert data.std == (round(float(pixels.std()), 4),)


def test_limit_comes_after_validation():
    whole, few = load_dataset("digits", validation=200), load_dataset("digits", validation=200, limit=37)
    assert (len(whole.train), len(whole.validation)) == (400, 200)
    same(few.train, whole.train.images[:37], whole.train.labels[:37])
    same(few.validation, whole.validation.images, whole.validation.labels)
    same(few.test, whole.test.images, whole.test.labels)


ARGUMENTS = [
    pytest.param({"name": "digit"}, "unknown dataset 'digit'; did you mean 'digits'", id="near-name"),
    pytest.param({"name": "cifra100"}, "unknown dataset 'cifra100'; did you mean 'cifar100'", id="swapped-letters"),
    pytest.param({"name": "missing.npz"}, "there is no 'missing.npz'; expected an .npz file", id="no-file"),
    pytest.param({"limit": 0}, "limit is 0; expected a whole number of at least 1", id="limit-0"),
    pytest.param({"limit": -2}, "limit is -2", id="limit-negative"),
    pytest.param({"limit": 2.5}, "limit is 2.5", id="limit-float"),
    pytest.param({"limit": 301}, "limit is 301; expected at most the 300 training images", id="limit-large"),
    pytest.param({"validation": 0}, "validation is 0; expected a whole number of at least 1", id="validation-0"),
    pytest.param({"validation": 600}, "validation is 600; expected less than the 600", id="validation-all"),
    pytest.param({"image_size": 16}, "image_size is 16 for 'digits'; expected it only for a folder", id="image-size"),
    pytest.param({"name": "cifar10"}, "cifar10 needs root", id="no-root"),
    pytest.param({"name": "cifar10", "root": "nowhere"}, "not in 'nowhere'.*CIFAR10.*download=True", id="empty-root"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_arguments_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_dataset(**({"name": "digits"} | arguments))
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_damaged_cifar_is_refused_before_it_is_unpickled(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")  # would run a command if it were unpickled
    with pytest.raises(InputError, match="not whole; get it with"):
        load_dataset("cifar100", root=tmp_path)


@pytest.mark.parametrize(("name", "class_name", "mean"), [
    pytest.param("cifar10", "CIFAR10", (0.4915, 0.4821, 0.4464), id="cifar10"),
    pytest.param("cifar100", "CIFAR100", (0.5072, 0.4866, 0.4410), id="cifar100"),
])  # fmt: skip
def test_cifar_splits(name, class_name, mean, tmp_path, monkeypatch):
    import torchvision

    class Fake:
        classes = ("apple", "bee", "cat")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert (root, download) == (str(tmp_path), False)
            count = 5_300 if train else 40
            generator = np.random.default_rng(count)
            self.data = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
            self.targets = generator.integers(0, 3, count).tolist()

    monkeypatch.setattr(torchvision.datasets, class_name, Fake)
    data, fake = load_dataset(name, root=tmp_path), Fake(str(tmp_path), True, False)
    assert (data.name, data.classes, data.mean) == (name, ("apple", "bee", "cat"), mean)
    same(data.train, fake.data[:300], np.array(fake.targets[:300]))
    same(data.validation, fake.data[300:], np.array(fake.targets[300:]))
    assert len(data.test) == 40
    assert len(load_dataset(name, root=tmp_path, validation=10).validation) == 10


# --- .npz files


def arrays(seed: int = 0, count: int = 30, shape: tuple[int, int, int] = (5, 6, 3)) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    return {
        "train_images": generator.integers(0, 256, (count, *shape), dtype=np.uint8),
        "train_labels": generator.permutation(labels),
        "test_images": generator.integers(0, 256, (7, *shape), dtype=np.uint8),
        "test_labels": generator.integers(0, 4, 7),
    }


def save(path: Path, content: dict) -> str:
    np.savez(path, **content)
    return str(path)


def test_npz(tmp_path):
    content = arrays()
    small = content["train_labels"].astype(np.uint8)
    data = load_dataset(save(tmp_path / "set.npz", content | {"train_labels": small}))
    assert (data.name, data.classes) == ("set.npz", ("0", "1", "2", "3"))
    assert (data.channels, data.image_size) == (3, (5, 6))
    same(data.train, content["train_images"][:27], content["train_labels"][:27])
    same(data.validation, content["train_images"][27:], content["train_labels"][27:])  # a tenth
    same(data.test, content["test_images"], content["test_labels"])
    pixels = content["train_images"][:27] / 255
    check_close("mean", torch.tensor(data.mean), torch.tensor(pixels.mean((0, 1, 2))).float(), 2e-4)
    check_close("std", torch.tensor(data.std), torch.tensor(pixels.std((0, 1, 2))).float(), 4e-4)


def test_npz_below_root_with_own_validation_and_names(tmp_path):
    content, other = arrays(), arrays(1)
    content |= {"validation_images": other["test_images"], "validation_labels": other["test_labels"]}
    save(tmp_path / "set.npz", content | {"classes": np.array(["a", "b", "c", "d", "never seen"])})
    data = load_dataset("set.npz", root=tmp_path)
    assert data.classes == ("a", "b", "c", "d", "never seen")
    same(data.train, content["train_images"], content["train_labels"])
    same(data.validation, other["test_images"], other["test_labels"])
    with pytest.raises(InputError, match=r"validation is 3, but set.npz has its own validation split"):
        load_dataset("set.npz", root=tmp_path, validation=3)


def test_training_images_stored_by_class_are_shuffled_first(tmp_path):
    content = arrays(count=400)
    content["train_labels"] = np.sort(content["train_labels"])
    content["train_images"][:, 0, 0, 0] = np.arange(400) % 256
    path = save(tmp_path / "set.npz", content)
    data, again, other = load_dataset(path), load_dataset(path), load_dataset(path, seed=1)
    for split in (data.train, data.validation, load_dataset(path, limit=40).train):
        assert set(split.labels.tolist()) == {0, 1, 2, 3}
    same(again.train, data.train.images, data.train.labels)
    assert not np.array_equal(other.train.labels, data.train.labels)
    order = np.concatenate([data.train.images, data.validation.images]).reshape(400, -1)
    labels = np.concatenate([data.train.labels, data.validation.labels])
    pairs = zip(content["train_images"], content["train_labels"], strict=True)
    expected = {image.tobytes(): label for image, label in pairs}
    assert [expected[image.tobytes()] for image in order] == labels.tolist()  # images kept their labels
    assert len({image.tobytes() for image in order}) == 400


def test_a_constant_channel_has_a_usable_deviation(tmp_path):
    content = arrays()
    content["train_images"][..., 1] = 51
    data = load_dataset(save(tmp_path / "set.npz", content))
    assert (data.mean[1], data.std[1]) == (0.2, 1.0)


def wrong_label(value: int) -> dict[str, np.ndarray]:
    labels = arrays()["test_labels"].copy()
    labels[2] = value
    return {"test_labels": labels}


IMAGES, LABELS = arrays()["train_images"], arrays()["train_labels"]
CONTENTS = [
    pytest.param({"train_labels": None}, "lacks train_labels; expected the keys train_images", id="missing-key"),
    pytest.param({"train_images": None, "test_images": None}, "lacks train_images, test_images", id="missing-two"),
    pytest.param({"validation_images": IMAGES}, "lacks validation_labels", id="half-a-validation-split"),
    pytest.param({"train_images": IMAGES / 255}, "train_images are float64; expected uint8", id="float-images"),
    pytest.param({"test_images": np.zeros((7, 5, 6, 3), np.int64)}, "test_images are int64", id="int64-images"),
    pytest.param({"train_images": IMAGES[..., 0]}, r"shape \(30, 5, 6\); expected \(N, H, W, C\)", id="no-channels"),
    pytest.param({"train_images": IMAGES.transpose(0, 3, 1, 2)}, r"\(30, 3, 5, 6\); expected \(N, H, W", id="nchw"),
    pytest.param({"train_images": IMAGES[:, :0]}, r"shape \(30, 0, 6, 3\)", id="no-rows"),
    pytest.param({"test_images": np.zeros((7, 8, 8, 3), np.uint8)}, r"test images are \(8, 8, 3\)", id="two-sizes"),
    pytest.param({"train_labels": LABELS[:29]}, "train_labels are 29; expected 30", id="label-count"),
    pytest.param({"train_labels": LABELS.astype(float)}, "train_labels are float64.*expected whole", id="float-labels"),
    pytest.param({"train_labels": np.eye(4, dtype=int)[LABELS]}, r"shape \(30, 4\)", id="one-hot-labels"),
    pytest.param({"train_labels": LABELS - 1}, r"train_labels\[\d+\] is -1; expected 0", id="negative-label"),
    pytest.param({"train_labels": LABELS.astype(np.uint64) + 2**63}, "train_labels reach 9223", id="huge-label"),
    pytest.param(wrong_label(4), r"test_labels\[2\] is 4; expected 0 to 3", id="label-not-in-training"),
    pytest.param({"classes": np.array(["a", "b"])}, r"train_labels\[\d+\] is \d; expected 0 to 1", id="few-names"),
    pytest.param({"classes": np.arange(4)}, "classes are int64 .*expected names", id="numbers-as-names"),
    pytest.param({"classes": np.array(["a", None])}, "without pickled objects", id="pickled-names"),
    pytest.param({"train_labels": LABELS * 0, "test_labels": np.zeros(7, int)}, "the one class '0'", id="one-class"),
    pytest.param({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, "test split is empty", id="empty-test"),
    pytest.param({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "train split is empty", id="empty-train"),
    pytest.param({"train_images": IMAGES[:1], "train_labels": LABELS[:1] * 0 + 3}, "validation is 1", id="one-image"),
]


@pytest.mark.parametrize(("change", "message"), CONTENTS)
def test_npz_is_refused(change, message, tmp_path):
    content = {key: value for key, value in (arrays() | change).items() if value is not None}
    path = save(tmp_path / "set.npz", content)
    with pytest.raises(InputError, match=message) as error:
        load_dataset(path)
    assert "set.npz" in one_line(error)


@pytest.mark.parametrize("keep", [0, 10, 900, -30], ids=["empty", "magic-only", "in-an-array", "in-the-directory"])
def test_truncated_npz_is_refused(keep, tmp_path):
    path = Path(save(tmp_path / "set.npz", arrays()))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"set.npz cannot be read as an .npz file") as error:
        load_dataset(str(path))
    one_line(error)


def test_damaged_bytes_and_other_files_are_refused(tmp_path):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **arrays())
    content = bytearray(path.read_bytes())
    content[400:500] = bytes(100)
    path.write_bytes(content)
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "single.npy", IMAGES)
    messages = {"set.npz": "cannot be read", "text.npz": "cannot be read", "single.npy": "single array"}
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            load_dataset(str(tmp_path / name))


# --- folders


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)


def write_classes(folder: Path, counts: dict[str, int], seed: int = 0, channels: int = 3) -> dict[bytes, str]:
    """PNGs of 6x5 in class folders; returns the class of every image."""
    generator, written = np.random.default_rng(seed), {}
    for name, count in counts.items():
        for i in range(count):
            pixels = generator.integers(0, 256, (6, 5, channels), dtype=np.uint8)
            write_image(folder / name / f"{i:03}.png", pixels)
            written[pixels.tobytes()] = name
    return written


def classes_of(split: Split, data: Dataset) -> dict[bytes, str]:
    found = {image.tobytes(): data.classes[label] for image, label in zip(split.images, split.labels, strict=True)}
    assert len(found) == len(split)
    return found


@pytest.mark.parametrize("test_name", ["test", "val"])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_train_and_test_folders(test_name, channels, tmp_path):
    train = write_classes(tmp_path / "set/train", {"bee": 11, "ant": 9}, 0, channels)
    test = write_classes(tmp_path / f"set/{test_name}", {"ant": 3, "bee": 4}, 1, channels)
    (tmp_path / "set/train/ant/Thumbs.db").write_bytes(b"not an image")
    (tmp_path / "set/train/.cache").mkdir()
    data = load_dataset(str(tmp_path / "set"))
    assert (data.name, data.classes, data.channels, data.image_size) == ("set", ("ant", "bee"), channels, (6, 5))
    assert (len(data.train), len(data.validation)) == (18, 2)
    assert classes_of(data.train, data) | classes_of(data.validation, data) == train
    assert classes_of(data.test, data) == test
    few = load_dataset(str(tmp_path / "set"), limit=5)
    same(few.train, data.train.images[:5], data.train.labels[:5])


def test_val_beside_test_is_the_validation_split(tmp_path):
    parts = enumerate(["train", "val", "test"])
    written = {part: write_classes(tmp_path / part, {"a": 4, "b": 5}, seed) for seed, part in parts}
    data = load_dataset(str(tmp_path))
    found = {"train": data.train, "val": data.validation, "test": data.test}
    assert {part: classes_of(split, data) for part, split in found.items()} == written


def test_class_folders_alone_are_split_by_class(tmp_path):
    written = write_classes(tmp_path, {"a": 10, "b": 25, "c": 2})
    data, again, other = (load_dataset(str(tmp_path), seed=seed) for seed in (0, 0, 1))
    assert np.bincount(data.test.labels).tolist() == [2, 5, 1]  # 20 %, at least one
    parts = [classes_of(split, data) for split in (data.train, data.validation, data.test)]
    assert sum(len(part) for part in parts) == 37  # no image in two splits
    assert parts[0] | parts[1] | parts[2] == written
    same(again.test, data.test.images, data.test.labels)
    same(again.train, data.train.images, data.train.labels)
    assert not np.array_equal(other.test.images, data.test.images)


def test_tiny_imagenet_layout(tmp_path):
    names = ["n01", "n02", "n03"]
    train = {}
    generator = np.random.default_rng(0)
    for name in names:
        train |= write_classes(tmp_path / "train" / name, {"images": 4}, seed=int(name[1:]))
        train = {image: name if where == "images" else where for image, where in train.items()}
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("000.png\t0\t0\t3\t3\n")
    lines, test = [], {}
    for i in range(5):
        pixels = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        write_image(tmp_path / "val/images" / f"val_{i}.png", pixels)
        lines.append(f"val_{i}.png\t{names[i % 3]}\t0\t0\t3\t3\n")
        test[pixels.tobytes()] = names[i % 3]
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    (tmp_path / "wnids.txt").write_text("\n".join(reversed(names)))
    (tmp_path / "words.txt").write_text("n01\tcrane, bird\nn02\tcrane\nn03\tlemon\nn99\tunused\n")
    write_image(tmp_path / "test/images/test_0.png", np.zeros((6, 5, 3), np.uint8))  # without labels: not read

    data = load_dataset(str(tmp_path))
    assert data.classes == ("crane (n01)", "crane (n02)", "lemon")
    words = dict(zip(names, data.classes, strict=True))
    found = classes_of(data.train, data) | classes_of(data.validation, data)
    assert found == {image: words[name] for image, name in train.items()}
    assert classes_of(data.test, data) == {image: words[name] for image, name in test.items()}
    (tmp_path / "words.txt").unlink()
    assert load_dataset(str(tmp_path)).classes == tuple(names)

    (tmp_path / "val/val_annotations.txt").write_text("val_0.png\tn07\t0\t0\t3\t3\n")
    with pytest.raises(InputError, match="line 1, has the class 'n07'"):
        load_dataset(str(tmp_path))


def test_whole_tiny_imagenet_has_its_known_statistics(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for i in range(200):
        write_image(tmp_path / f"train/n{i:03}/images/0.jpg", pixels)
    write_image(tmp_path / "val/images/0.jpg", pixels)
    (tmp_path / "val/val_annotations.txt").write_text("0.jpg\tn007\t0\t0\t3\t3\n")
    data = load_dataset(str(tmp_path), limit=3)
    assert data.mean == (0.4802, 0.4481, 0.3976)
    assert data.std == (0.2770, 0.2691, 0.2822)


def test_image_size_resizes_the_centre_square(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = (200, 10, 60)  # the middle square is one colour, the rest is black
    tall = np.zeros((16, 8, 3), np.uint8)
    tall[4:12] = (200, 10, 60)
    for i in range(5):
        write_image(tmp_path / f"a/{i}.png", wide)
        write_image(tmp_path / f"b/{i}.png", tall)
    with pytest.raises(InputError, match=r"is (16x8|4x12) pixels, another image is (16x8|4x12).*option image_size"):
        load_dataset(str(tmp_path))
    data = load_dataset(str(tmp_path), image_size=6)
    assert data.image_size == (6, 6)
    assert (data.train.images == np.array([200, 10, 60], np.uint8)).all()
    assert (data.test.images == np.array([200, 10, 60], np.uint8)).all()


def test_grey_images_among_colour_ones_become_rgb(tmp_path):
    write_classes(tmp_path, {"a": 6}, channels=1)
    written = write_classes(tmp_path, {"b": 6})
    data = load_dataset(str(tmp_path))
    assert data.channels == 3
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        assert (image.tobytes() in written) == (label == 1)
        assert (label == 1) or (image[..., 0] == image[..., 2]).all()


def two_classes(folder: Path) -> None:
    write_classes(folder / "train", {"a": 4, "b": 4})
    write_classes(folder / "test", {"a": 2, "b": 2})


def damage(name: str, content: bytes | None):
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:60] if content is None else content)

    return change


FOLDERS = [
    pytest.param(damage("train/a/001.png", b"text"), "001.png is not a readable image", id="not-an-image"),
    pytest.param(damage("test/b/001.png", None), "001.png is not a readable image", id="truncated-image"),
    pytest.param(damage("train/a/000.png", b""), "000.png is not a readable image", id="empty-first-image"),
    pytest.param(lambda f: write_classes(f / "test", {"c": 1}), "class folder 'c'; expected only", id="new-class"),
    pytest.param(lambda f: (f / "train/c").mkdir(), "c holds no images", id="empty-class"),
    pytest.param(lambda f: (f / "test").rename(f / "held"), "neither test/ nor val/", id="no-test"),
    pytest.param(
        lambda f: Image.fromarray(np.full((6, 5), 999, np.uint16)).save(f / "train/a/001.png"),
        "mode 'I;16'; expected 8-bit",
        id="sixteen-bits",
    ),
    pytest.param(
        lambda f: write_image(f / "train/a/002.png", np.zeros((9, 5, 3), np.uint8)),
        "002.png is 9x5 pixels, another image is 6x5",
        id="sizes",
    ),
]


@pytest.mark.parametrize(("change", "message"), FOLDERS)
def test_folder_is_refused(change, message, tmp_path):
    two_classes(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_dataset(str(tmp_path))
    one_line(error)


def test_folders_without_classes_or_with_one_image_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no folders; expected one folder of images for each class"):
        load_dataset(str(tmp_path / "empty"))
    write_classes(tmp_path / "few", {"a": 3, "b": 1})
    with pytest.raises(InputError, match="class folder 'b' holds 1 image; expected at least 2"):
        load_dataset(str(tmp_path / "few"))


def test_only_the_images_kept_are_decoded(tmp_path):
    two_classes(tmp_path)
    whole = load_dataset(str(tmp_path), limit=7)
    written = {path.read_bytes(): path for path in (tmp_path / "train").rglob("*.png")}
    kept = {image.tobytes() for image in load_dataset(str(tmp_path), limit=2).train.images}
    kept |= {image.tobytes() for image in whole.validation.images}
    unused = [path for path in written.values() if np.asarray(Image.open(path)).tobytes() not in kept]
    assert len(unused) == 5
    for path in unused:
        if path.name != "000.png":  # the header of the first image gives the size
            path.write_bytes(b"text")
    few = load_dataset(str(tmp_path), limit=2)
    same(few.train, whole.train.images[:2], whole.train.labels[:2])


def test_importing_the_package_loads_no_scikit_learn_and_no_torchvision():
    import subprocess

    code = "import sys, fastensdistill.data as d; print([m for m in ('sklearn', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


BY_HAND = [
    pytest.param({"train": Split(IMAGES / 255, LABELS)}, "train_images are float64", id="float-images"),
    pytest.param({"train": Split(IMAGES, LABELS + 1)}, r"train_labels\[\d+\] is 4; expected", id="label-too-big"),
    pytest.param({"test": Split(IMAGES.transpose(0, 3, 1, 2), LABELS)}, r"expected \(N, H, W, C\)", id="nchw"),
    pytest.param({"test": Split(IMAGES[:, :4], LABELS)}, r"test images are \(4, 6, 3\)", id="two-sizes"),
    pytest.param({"validation": Split(IMAGES[:0], LABELS[:0])}, "validation split is empty", id="empty"),
    pytest.param({"test": Split(torch.from_numpy(IMAGES), LABELS)}, "a Tensor; expected a NumPy array", id="tensor"),
    pytest.param({"mean": (0.5,)}, "expected one of each for 3 channels", id="statistics"),
    pytest.param({"std": (0.2, 0.2, 0.0)}, "std above 0", id="no-deviation"),
    pytest.param({"classes": ("a",)}, "at least 2", id="one-class"),
]


@pytest.mark.parametrize(("change", "message"), BY_HAND)
def test_a_data_set_made_by_hand_is_checked(change, message):
    parts = {name: Split(IMAGES, LABELS) for name in ("train", "validation", "test")}
    whole = {"name": "mine", **parts, "classes": tuple("abcd"), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    assert Dataset(**whole).image_size == (5, 6)
    with pytest.raises(InputError, match=message) as error:
        Dataset(**(whole | change))
    assert "mine" in one_line(error)


def test_what_an_npz_holds_instead_is_said(tmp_path):
    np.savez(tmp_path / "set.npz", x_train=IMAGES, y_train=LABELS)
    with pytest.raises(InputError, match="found x_train, y_train"):
        load_dataset(tmp_path / "set.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="no archive") as error:
        load_dataset(tmp_path / "text.npz")
    assert "allow_pickle" not in str(error.value)
    with pytest.raises(InputError, match="unknown dataset 'digit'; did you mean 'digits'"):
        load_dataset(Path("digit"))

"""``.npz`` files: every way that people store images and labels in them, and every refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastensdistill.data import Split, load_dataset
from fastensdistill.data.npz import Key, read_key
from fastensdistill.errors import InputError
from tests.datasets import arrays, one_line, pairs, same, save
from tests.untyped import untyped

CONTENT = arrays()
IMAGES, LABELS = CONTENT["train_images"], CONTENT["train_labels"]
GREY = arrays(shape=(5, 6))
PARTS = ("train_images", "train_labels", "test_images", "test_labels")


def test_npz(tmp_path):
    small = LABELS.astype(np.uint8)
    data = load_dataset(save(tmp_path / "set.npz", CONTENT | {"train_labels": small}))
    assert (data.name, data.classes) == ("set.npz", ("0", "1", "2", "3"))
    assert (data.channels, data.image_size, data.mirrors) == (3, (5, 6), False)
    assert pairs(data.train, data.validation) == pairs(Split(IMAGES, LABELS))
    assert np.bincount(data.validation.labels).tolist() == [1, 1, 1, 1]  # a tenth, and one of each class
    same(data.test, CONTENT["test_images"], CONTENT["test_labels"])
    pixels = data.train.images / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(data.std, pixels.std((0, 1, 2)), atol=1e-4)
    assert any("validation" in note for note in data.notes)


def test_npz_below_root_with_own_validation_and_names(tmp_path):
    other = arrays(1)
    content = CONTENT | {"validation_images": other["test_images"], "validation_labels": other["test_labels"]}
    save(tmp_path / "set.npz", content | {"classes": np.array(["a", "b", "c", "d", "never seen"])})
    data = load_dataset("set.npz", root=tmp_path)
    assert data.classes == ("a", "b", "c", "d", "never seen")
    same(data.train, IMAGES, LABELS)
    same(data.validation, other["test_images"], other["test_labels"])
    assert "no training images of 1 of 5 classes: never seen" in data.notes
    with pytest.raises(InputError, match=r"validation is 3, but set.npz has its own validation split"):
        load_dataset("set.npz", root=tmp_path, validation=3)


@pytest.mark.parametrize(("name", "key"), [
    ("train_images", Key("train", "images")), ("x_train", Key("train", "images")), ("X_train", Key("train", "images")),
    ("y_test", Key("test", "labels")), ("ytest", Key("test", "labels")), ("xTrain", Key("train", "images")),
    ("trainX", Key("train", "images")), ("testLabels", Key("test", "labels")), ("x_trn", Key("trn", "images")),
    ("val_labels", Key("val", "labels")), ("valid/data", Key("valid", "images")), ("train-x", Key("train", "images")),
    ("training.targets", Key("training", "labels")), ("images", Key("", "images")), ("y", Key("", "labels")),
    ("arr_0", None), ("train_ids", None), ("classes", None), ("train_images_small", None), ("train_test_x", None),
    ("_", None),
])  # fmt: skip
def test_names_of_arrays(name, key):
    assert read_key(name) == key


@pytest.mark.parametrize("names", [
    pytest.param(("x_train", "y_train", "x_test", "y_test"), id="keras"),
    pytest.param(("train_x", "train_y", "test_x", "test_y"), id="kind-last"),
    pytest.param(("training_images", "training_labels", "testing_images", "testing_labels"), id="long"),
    pytest.param(("Train_Data", "Train_Targets", "Eval_Data", "Eval_Targets"), id="eval-and-capitals"),
])  # fmt: skip
def test_other_names_of_the_same_arrays(names, tmp_path):
    renamed = dict(zip(names, (CONTENT[part] for part in PARTS), strict=True))
    data = load_dataset(save(tmp_path / "set.npz", renamed | {"train_ids": np.arange(30)}))
    same(data.test, CONTENT["test_images"], CONTENT["test_labels"])
    assert pairs(data.train, data.validation) == pairs(Split(IMAGES, LABELS))
    assert "not read in set.npz: train_ids" in data.notes


def test_medmnist(tmp_path):
    content = GREY | {"val_images": GREY["test_images"], "val_labels": GREY["test_labels"]}
    content = {k: v[:, None].astype(np.uint8) if k.endswith("labels") else v for k, v in content.items()}
    data = load_dataset(save(tmp_path / "breastmnist.npz", content))
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 7, 7)
    same(data.train, GREY["train_images"][..., None], GREY["train_labels"])
    same(data.validation, GREY["test_images"][..., None], GREY["test_labels"])


def test_val_alone_is_the_test_split(tmp_path):
    content = {key.replace("test", "valid"): value for key, value in CONTENT.items()}
    data = load_dataset(save(tmp_path / "set.npz", content))
    same(data.test, CONTENT["test_images"], CONTENT["test_labels"])
    assert len(data.train) + len(data.validation) == 30
    assert any(note.startswith("valid is the test split") for note in data.notes)


@pytest.mark.parametrize("names", [("train_images", "train_labels"), ("data", "labels"), ("X", "y")])
def test_one_split_alone_gives_the_others(names, tmp_path):
    data = load_dataset(save(tmp_path / "set.npz", dict(zip(names, (IMAGES, LABELS), strict=True))))
    assert pairs(data.train, data.validation, data.test) == pairs(Split(IMAGES, LABELS))
    assert np.bincount(data.test.labels).tolist() == [2, 2, 1, 1]  # a fifth of 8, 8, 7 and 7, rounded
    assert any("no test split: 6 images" in note for note in data.notes)


def changed(**content: np.ndarray) -> dict[str, np.ndarray]:
    return CONTENT | content


BOTH = {part: CONTENT[part] for part in ("train_images", "test_images")}
SAME_IMAGES = [
    pytest.param({k: v.transpose(0, 3, 1, 2) for k, v in BOTH.items()}, 1, "channels first", id="channels-first"),
    pytest.param({k: v / 255 for k, v in BOTH.items()}, 1, "float64 from 0 to 1", id="fractions"),
    pytest.param({k: (v / 255).astype(np.float32) for k, v in BOTH.items()}, 1, "float32 from 0", id="float32"),
    pytest.param({k: v.astype(np.float32) for k, v in BOTH.items()}, 1, None, id="whole-floats"),
    pytest.param({k: v.astype(np.int64) for k, v in BOTH.items()}, 1, None, id="int64"),
    pytest.param({k: v.astype(np.uint16) for k, v in BOTH.items()}, 1, None, id="uint16"),
    pytest.param({k: v // 16 for k, v in BOTH.items()}, 16, "brighter than 15 of 255", id="dark"),
]


@pytest.mark.parametrize(("images", "scale", "note"), SAME_IMAGES)
def test_images_are_understood(images, scale, note, tmp_path):
    data = load_dataset(save(tmp_path / "set.npz", CONTENT | images))
    np.testing.assert_array_equal(data.test.images, CONTENT["test_images"] // scale)
    assert data.test.images.dtype == np.uint8
    assert note is None or any(note in said for said in data.notes)


def test_grey_channels_first_and_black_and_white(tmp_path):
    first = {k: v[:, None] if k.endswith("images") else v for k, v in GREY.items()}
    same(load_dataset(save(tmp_path / "a.npz", first)).test, GREY["test_images"][..., None], GREY["test_labels"])
    bits = {k: v > 127 if k.endswith("images") else v for k, v in GREY.items()}
    expected = np.where(bits["test_images"], 255, 0)[..., None]
    np.testing.assert_array_equal(load_dataset(save(tmp_path / "b.npz", bits)).test.images, expected)


NAMES = np.array(["ant", "bee", "cat", "dog"])
SAME_LABELS = [
    pytest.param(lambda labels: labels[:, None], None, id="column"),
    pytest.param(lambda labels: labels[None], None, id="row"),
    pytest.param(lambda labels: labels.astype(float), None, id="whole-floats"),
    pytest.param(lambda labels: np.eye(4, dtype=np.uint8)[labels], None, id="one-hot"),
    pytest.param(lambda labels: np.eye(4, dtype=np.float32)[labels], None, id="one-hot-floats"),
    pytest.param(lambda labels: labels + 1, ("1", "2", "3", "4"), id="from-one"),
    pytest.param(lambda labels: NAMES[labels], ("ant", "bee", "cat", "dog"), id="names"),
    pytest.param(lambda labels: NAMES[labels].astype("S3"), ("ant", "bee", "cat", "dog"), id="names-as-bytes"),
]


@pytest.mark.parametrize(("change", "classes"), SAME_LABELS)
def test_labels_are_understood(change, classes, tmp_path):
    labels = {part: change(CONTENT[part]) for part in ("train_labels", "test_labels")}
    data = load_dataset(save(tmp_path / "set.npz", CONTENT | labels))
    same(data.test, CONTENT["test_images"], CONTENT["test_labels"])
    assert data.classes == (classes or ("0", "1", "2", "3"))


@pytest.mark.parametrize("key", ["classes", "class_names", "label_names"])
def test_names_of_classes_that_count_from_one(key, tmp_path):
    labels = {part: CONTENT[part] + 1 for part in ("train_labels", "test_labels")}
    data = load_dataset(save(tmp_path / "set.npz", CONTENT | labels | {key: NAMES}))
    same(data.test, CONTENT["test_images"], CONTENT["test_labels"])
    assert data.classes == ("ant", "bee", "cat", "dog")
    assert "labels run from 1 to 4: label 1 is class 0" in data.notes


def test_numbers_that_no_training_image_has_are_said(tmp_path):
    labels = {part: CONTENT[part] * 2 for part in ("train_labels", "test_labels")}
    data = load_dataset(save(tmp_path / "set.npz", CONTENT | labels))
    same(data.test, CONTENT["test_images"], CONTENT["test_labels"] * 2)
    assert "no training images of 3 of 7 classes: 1, 3, 5" in data.notes


def test_a_constant_channel_has_a_usable_deviation(tmp_path):
    images = IMAGES.copy()
    images[..., 1] = 51
    data = load_dataset(save(tmp_path / "set.npz", changed(train_images=images)))
    assert (data.mean[1], data.std[1]) == (0.2, 1.0)


def wrong_label(value: int) -> dict[str, np.ndarray]:
    labels = CONTENT["test_labels"].copy()
    labels[2] = value
    return {"test_labels": labels}


def stretched(images: np.ndarray) -> dict[str, np.ndarray]:
    return {part: images.astype(np.float64) for part in ("train_images", "test_images")} | {"test_labels": LABELS}


VOLUMES = {part: np.zeros((30, 8, 8, 8), np.uint8) for part in ("train_images", "test_images")}
SEVERAL = {"train_labels": np.ones((30, 4), int), "test_labels": np.ones((7, 4), int)}
REFUSED = [
    pytest.param({"train_labels": None}, "lacks train_labels; expected train_images, train_labels", id="missing-key"),
    pytest.param({"train_images": None, "test_images": None}, "lacks train_images, test_images", id="missing-two"),
    pytest.param({"train_images": None, "train_labels": None}, "lacks train_images, train_labels", id="no-training"),
    pytest.param({"validation_images": IMAGES}, "lacks validation_labels", id="half-a-validation-split"),
    pytest.param({"test_labels": None}, "lacks test_labels", id="unlabelled-test"),
    pytest.param({"x_train": IMAGES}, "holds both train_images and x_train; expected one", id="two-names"),
    pytest.param({"val_x": IMAGES, "valid_x": IMAGES}, "has both val and valid; expected one", id="two-validations"),
    pytest.param({"images": IMAGES, "labels": LABELS}, "holds images beside splits", id="bare-names"),
    pytest.param({"a": IMAGES, "b": LABELS} | dict.fromkeys(PARTS), "lacks .*found a, b", id="unknown-names"),
    pytest.param(stretched(IMAGES / 255 * 4 - 2), "float64 from -2 to 2; expected pixels 0 to 255", id="normalised"),
    pytest.param(stretched(IMAGES * 0.7) | {"test_images": IMAGES}, "hold fractions beyond 1", id="fractions-of-255"),
    pytest.param(stretched(IMAGES // 16), "float64 and reach 15; expected uint8", id="sixteen-greys"),
    pytest.param(stretched(IMAGES * np.nan), "not finite", id="not-a-number"),
    pytest.param({"train_images": IMAGES.astype(np.uint16) * 257}, "uint16 from .* to 65535", id="sixteen-bits"),
    pytest.param({"train_images": IMAGES.astype("U3")}, "<U3; expected uint8", id="text-as-images"),
    pytest.param({"train_images": IMAGES.reshape(30, -1)}, "laid out as rows", id="rows"),
    pytest.param(VOLUMES, r"\(30, 8, 8, 8\), volumes; expected \(N, H, W, C\)", id="volumes"),
    pytest.param({"train_images": np.zeros((30, 8, 8, 4), np.uint8)}, r"\(30, 8, 8, 4\); expected", id="rgba"),
    pytest.param({"train_images": IMAGES[:, :0]}, r"shape \(30, 0, 6, 3\)", id="no-rows"),
    pytest.param({"test_images": np.zeros((7, 8, 8, 3), np.uint8)}, r"test images are \(8, 8, 3\)", id="two-sizes"),
    pytest.param({"train_images": IMAGES[..., 0]}, r"test images are \(5, 6, 3\); expected \(5, 6, 1", id="grey-train"),
    pytest.param({"train_labels": LABELS[:29]}, "train_labels are 29; expected 30", id="label-count"),
    pytest.param({"train_labels": LABELS + 0.5}, "train_labels are float64.*expected whole", id="float-labels"),
    pytest.param({"train_labels": np.eye(4, dtype=int)[LABELS]}, "other labels one-hot rows", id="one-hot-and-not"),
    pytest.param(SEVERAL, "several labels for an image cannot be learned", id="several-labels"),
    pytest.param({"train_labels": LABELS - 1}, r"train_labels\[\d+\] is -1; expected 0", id="negative-label"),
    pytest.param({"train_labels": LABELS.astype(np.uint64) + 2**63}, "train_labels reach 9223", id="huge-label"),
    pytest.param(wrong_label(4), r"test_labels\[2\] is 4; expected 0 to 3", id="label-not-in-training"),
    pytest.param({"train_labels": NAMES[LABELS], "test_labels": np.array(["eel"] * 7)}, "'eel'", id="unknown-name"),
    pytest.param({"classes": np.array(["a", "b"])}, r"train_labels\[\d+\] is \d; expected 0 to 1", id="few-names"),
    pytest.param({"classes": np.array(["a", "b", "c", "a"])}, "two classes 'a'", id="one-name-twice"),
    pytest.param({"classes": np.arange(4)}, "classes are int64 .*expected names", id="numbers-as-names"),
    pytest.param({"classes": np.array(["a", None])}, "without pickled objects", id="pickled-names"),
    pytest.param({"train_labels": LABELS * 0, "test_labels": np.zeros(7, int)}, "the one class '0'", id="one-class"),
    pytest.param({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, "test split is empty", id="empty-test"),
    pytest.param({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "train split is empty", id="empty-train"),
    pytest.param({"train_images": IMAGES[:1], "train_labels": LABELS[:1] * 0 + 3}, "has one image in", id="one-image"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_npz_is_refused(change, message, tmp_path):
    content = {key: value for key, value in (CONTENT | change).items() if value is not None}
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
    np.savez_compressed(path, **untyped(arrays()))
    content = bytearray(path.read_bytes())
    content[400:500] = bytes(100)
    path.write_bytes(content)
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "single.npy", IMAGES)
    messages = {"set.npz": "cannot be read", "text.npz": "cannot be read", "single.npy": "single array"}
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            load_dataset(str(tmp_path / name))


def test_archives_of_images_and_unknown_arrays_are_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("train/cat/0.png", b"")
    (tmp_path / "set.zip").rename(tmp_path / "images.npz")
    (tmp_path / "set.tar.gz").write_bytes(b"")
    np.savez(tmp_path / "set.npz", IMAGES, LABELS)
    messages = {"images.npz": "archive without arrays; expected the folder", "set.npz": "lacks .* found arr_0, arr_1"}
    for name, message in (messages | {"set.tar.gz": "is an archive; expected the folder"}).items():
        with pytest.raises(InputError, match=message) as error:
            load_dataset(tmp_path / name)
        one_line(error)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="no archive") as error:
        load_dataset(tmp_path / "text.npz")
    assert "allow_pickle" not in str(error.value)

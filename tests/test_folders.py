"""Folders of images: every layout that people have, what is left out, and every refusal."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastensdistill.data import load_dataset
from fastensdistill.errors import InputError
from tests.datasets import classes_of, one_line, pairs, same, write_classes, write_image
from tests.untyped import untyped

PIXELS = np.zeros((6, 5, 3), np.uint8)


@pytest.mark.parametrize("test_name", ["test", "val", "Testing", "eval", "valid", "test_set"])
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
    assert set(pairs(few.train)) < set(pairs(data.train))
    assert sorted(set(few.train.labels)) == [0, 1]


@pytest.mark.parametrize("names", [
    ("train", "val", "test"), ("Train", "Valid", "Test"), ("TRAINING", "VALIDATION", "TESTING"),
    ("train", "dev", "test"),
    ("train", "eval", "test"), ("train", "val", "eval"), ("training_set", "val_set", "test_set"),
    ("train2017", "val2017", "test2017"), ("seg_train/seg_train", "seg_val/seg_val", "seg_test/seg_test"),
    ("images/train", "images/val", "images/test"), ("set/set/train", "set/set/val", "set/set/test"),
])  # fmt: skip
def test_all_splits_that_are_there_are_used(names, tmp_path):
    written = [write_classes(tmp_path / part, {"a": 4, "b": 5}, seed) for seed, part in enumerate(names)]
    for beside in ("docs/note.txt", "__MACOSX/train/a/._0.png", ".git/x.png", "labels/train/0.txt", "train.csv"):
        (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / beside).write_text("")
    data = load_dataset(str(tmp_path))
    assert [classes_of(split, data) for split in (data.train, data.validation, data.test)] == written
    with pytest.raises(InputError, match=r"validation is 3, but .* has its own"):
        load_dataset(str(tmp_path), validation=3)


@pytest.mark.parametrize("unlabelled", ["test/{}.png", "test/images/{}.png", "test/unknown/{}.png"])
@pytest.mark.parametrize("val", [True, False], ids=["val", "no-val"])
def test_a_test_folder_without_labels_is_not_read(unlabelled, val, tmp_path):
    train = write_classes(tmp_path / "train", {"a": 10, "b": 10})
    known = write_classes(tmp_path / "val", {"a": 3, "b": 4}, 1) if val else {}
    for i in range(5):
        write_image(tmp_path / unlabelled.format(i), PIXELS)
    data = load_dataset(str(tmp_path))
    if val:
        assert classes_of(data.test, data) == known
        assert any(note.startswith("val/ is the test split") for note in data.notes)
    else:
        assert np.bincount(data.test.labels).tolist() == [2, 2]
        train = train.copy()
        train = {image: name for image, name in train.items() if image not in classes_of(data.test, data)}
    assert classes_of(data.train, data) | classes_of(data.validation, data) == train
    assert any(note.startswith("test/ has no labels") or note.startswith("test") for note in data.notes)


def test_the_set_is_found_beside_documents(tmp_path):
    written = write_classes(tmp_path / "a/data/train", {"cat": 4, "dog": 4})
    test = write_classes(tmp_path / "a/data/test", {"cat": 2, "dog": 2}, 1)
    images = write_classes(tmp_path / "b/images", {"cat": 5, "dog": 5}, 2)
    for beside in ("a/docs", "b/docs"):
        for i in range(3):
            write_image(tmp_path / beside / f"{i}.png", PIXELS)
    data = load_dataset(tmp_path / "a")
    assert classes_of(data.train, data) | classes_of(data.validation, data) == written
    assert classes_of(data.test, data) == test
    assert "left out, as they lie beside data/: docs" in data.notes
    data = load_dataset(tmp_path / "b")
    assert sorted(pairs(data.train, data.validation, data.test)) == sorted(
        (image, ["cat", "dog"].index(name)) for image, name in images.items()
    )


def test_train_alone_is_split_and_a_class_of_trains_is_a_class(tmp_path):
    written = write_classes(tmp_path / "a/train", {"cat": 10, "dog": 10})
    data = load_dataset(str(tmp_path / "a"))
    assert data.classes == ("cat", "dog")
    parts = [classes_of(split, data) for split in (data.train, data.validation, data.test)]
    assert parts[0] | parts[1] | parts[2] == written
    written = write_classes(tmp_path / "b", {"train": 10, "car": 10, "sea/test": 5})
    assert load_dataset(tmp_path / "b").classes == ("car", "sea", "train")


def test_tiny_imagenet_with_its_validation_images_beside_their_list(tmp_path):
    train = write_classes(tmp_path / "train", {"n01": 5, "n02": 5})
    shown = write_classes(tmp_path / "elsewhere", {"n01": 2, "n02": 2}, 1)
    (tmp_path / "val").mkdir()
    lines = []
    for i, file in enumerate(sorted((tmp_path / "elsewhere").glob("*/*"))):
        lines.append(f"val_{i}.png\t{file.parent.name}\t0\t0\t7\t7\n")
        file.rename(tmp_path / f"val/val_{i}.png")
    for name in ("n01", "n02", ""):
        (tmp_path / "elsewhere" / name).rmdir()
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    data = load_dataset(tmp_path)
    assert classes_of(data.test, data) == shown
    assert classes_of(data.train, data) | classes_of(data.validation, data) == train


@pytest.mark.parametrize("layout", ["val/{name}", "val/{name}/images"])
def test_tiny_imagenet_put_into_class_folders(layout, tmp_path):
    test: dict[bytes, str] = {}
    for seed, name in enumerate(("n01", "n02")):
        write_classes(tmp_path / "train" / name, {"images": 5}, seed)
        written = write_classes(tmp_path / layout.format(name=name), {"": 3}, seed + 5)
        test |= dict.fromkeys(written, name)
    (tmp_path / "val/images").mkdir(exist_ok=True)
    (tmp_path / "val/val_annotations.txt").write_text("0.png\tn01\t0\t0\t7\t7\n")
    for i in range(4):
        write_image(tmp_path / f"test/images/{i}.png", PIXELS)
    data = load_dataset(str(tmp_path))
    assert classes_of(data.test, data) == test
    assert any("test" in note and "no labels" in note for note in data.notes)


def test_hidden_folders_are_left_out_and_linked_ones_read(tmp_path):
    written = write_classes(tmp_path / "set", {"cat": 5, "dog/deep/er": 5})
    for hidden in ("cat/.ipynb_checkpoints", "dog/__MACOSX", "dog/deep/@eaDir", "cat/.thumbs/x", ".git/cat"):
        write_image(tmp_path / "set" / hidden / "9.png", PIXELS)
    write_image(tmp_path / "set/cat/._000.png", PIXELS)
    written |= write_classes(tmp_path / "elsewhere", {"eel": 4}, 2)
    (tmp_path / "set/eel").symlink_to(tmp_path / "elsewhere/eel")
    one = np.full((6, 5, 3), 7, np.uint8)
    write_image(tmp_path / "linked.png", one)
    (tmp_path / "set/cat/linked.png").symlink_to(tmp_path / "linked.png")
    (tmp_path / "set/dog/round").symlink_to(tmp_path / "set/dog")  # no end to it
    (tmp_path / "set/dog/above").symlink_to(tmp_path / "set")  # where cats are
    (tmp_path / "set/dog/itself").symlink_to(tmp_path / "set/dog/itself")
    os.mkfifo(tmp_path / "set/dog/pipe")
    data = load_dataset(tmp_path / "set")
    found = [classes_of(split, data) for split in (data.train, data.validation, data.test)]
    written = {image: name.split("/")[0] for image, name in written.items()} | {one.tobytes(): "cat"}
    assert sum(map(len, found)) == len(written)
    assert found[0] | found[1] | found[2] == written
    (tmp_path / "linked.png").unlink()
    with pytest.raises(InputError, match=r"linked.png is not a readable image"):
        load_dataset(tmp_path / "set")
    (tmp_path / "set/fox").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"set/fox is a link to what is not there"):
        load_dataset(tmp_path / "set")


def test_what_is_left_out_is_said(tmp_path):
    two_classes(tmp_path)
    write_image(tmp_path / "train/stray.png", PIXELS)
    write_classes(tmp_path, {"more": 2})
    for name in ("notes.txt", "Thumbs.db", "x.bin", "y.bin", "README"):
        (tmp_path / "train/a" / name).write_text("no image")
    (tmp_path / "train/annotations").mkdir()
    notes = load_dataset(tmp_path).notes
    assert "left out, as they are in no class folder: 1 images in train" in notes
    assert "left out, as they are no splits: more" in notes
    assert "files left out, which are no images: 1 without suffix, 2 .bin" in notes


def test_class_folders_whose_names_are_no_text(tmp_path):
    folder = os.fsencode(tmp_path)
    for part in (b"train", b"test"):
        for name in (b"caf\xe9", "e\u0301clair".encode() if part == b"train" else "\u00e9clair".encode(), b"a\x1b[1m"):
            os.makedirs(os.path.join(folder, part, name))
            for i in range(3):
                path = os.path.join(folder, part, name, b"%d.png" % i)
                Image.fromarray(np.full((6, 5, 3), i, np.uint8)).save(os.fsdecode(path))
    data = load_dataset(tmp_path)
    assert data.classes == ("a\ufffd[1m", "caf\ufffd", "\u00e9clair")
    assert len(data.test) == 9
    "".join(data.classes).encode()
    os.makedirs(os.path.join(folder, b"train", b"caf\xe8"))
    with pytest.raises(InputError, match="two folders that read 'caf\ufffd'"):
        load_dataset(tmp_path)


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
    train: dict[bytes, str] = {}
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
    write_image(tmp_path / "train/n007/images/1.jpg", pixels)
    write_image(tmp_path / "val/images/0.jpg", pixels)
    (tmp_path / "val/val_annotations.txt").write_text("0.jpg\tn007\t0\t0\t3\t3\n")
    data = load_dataset(str(tmp_path), limit=3)
    assert data.mean == (0.4802, 0.4481, 0.3976)
    assert data.std == (0.2770, 0.2691, 0.2822)
    assert data.mirrors


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
    pytest.param(lambda f: (f / "train").rename(f / "held"), "folders a, b in each of held, test", id="no-train"),
    pytest.param(
        lambda f: [write_classes(f / p, {"a": 1, "b": 1}) for p in ("val", "valid")],
        "both val and valid",
        id="val-twice",
    ),
    pytest.param(lambda f: write_classes(f / "TRAIN", {"a": 1}), "has both TRAIN and train", id="train-twice"),
    pytest.param(
        lambda f: [untyped(write_image)(f / p, PIXELS) for p in ("val/0.png", "val/1.png")],
        "val holds images but no",
        id="flat-val",
    ),
    pytest.param(
        lambda f: [untyped(write_image)(f / p, PIXELS) for p in ("test/c/0.png", "test/d/1.png")],
        "class folder 'c'",
        id="new-classes",
    ),
    pytest.param(
        lambda f: (f / "train/a/0.heic").write_bytes(b"0000ftypheic"), "0.heic is an image that Pillow", id="heic"
    ),
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
    with pytest.raises(InputError, match="class 'b' holds 1 image; expected at least 2"):
        load_dataset(str(tmp_path / "few"))


def test_only_the_images_kept_are_decoded(tmp_path):
    two_classes(tmp_path)
    whole = load_dataset(str(tmp_path), limit=6)
    few = load_dataset(str(tmp_path), limit=2)
    assert set(pairs(few.train)) < set(pairs(whole.train))
    kept = {image.tobytes() for image in (*few.train.images, *whole.validation.images)}
    every = {path: np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "train").rglob("*.png")}
    unused = [path for path, image in every.items() if image not in kept]
    assert len(unused) == 4
    for path in unused:
        if path.name != "000.png":  # the header of the first image gives the size
            path.write_bytes(b"text")
    same(load_dataset(str(tmp_path), limit=2).train, few.train.images, few.train.labels)


def writer_of(files: list[str]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for file in files:
            write_image(folder / file, PIXELS)

    return write


LAYOUTS = [
    pytest.param(["train/0.png", "test/0.png"], r"but no class folders.*train.csv are not read", id="kaggle"),
    pytest.param(["0.png", "1.png"], "holds images but no class folders", id="flat"),
    pytest.param(["images/0.png", "masks/0.png"], "layout of detection or segmentation", id="masks"),
    pytest.param(["train/images/0.png", "train/labels/0.png", "val/images/0.png"], "of detection", id="yolo"),
    pytest.param(["val/a/0.png", "test/a/0.png"], "has test, val but no train", id="no-train"),
    pytest.param([f"{c}/{s}/0.png" for c in "ab" for s in ("train", "test")], "test, train in each", id="inside-out"),
    pytest.param([f"{d}/{c}/0.png" for c in "ab" for d in ("art", "photo")], "a, b in each of art", id="domains"),
    pytest.param(["a/0.png", "a/1.png"], "has the one class 'a'; expected at least 2", id="one-class"),
]


@pytest.mark.parametrize(("files", "message"), LAYOUTS)
def test_layouts_that_hold_no_classes_are_refused(files, message, tmp_path):
    writer_of(files)(tmp_path)
    (tmp_path / "train.csv").write_text("id,label")
    with pytest.raises(InputError, match=message) as error:
        load_dataset(tmp_path)
    one_line(error)

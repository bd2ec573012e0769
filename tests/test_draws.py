"""What is held out of the training images: class by class, in proportion, the same in every run."""

from __future__ import annotations

import numpy as np
import pytest

from fastensdistill.data import load_dataset
from fastensdistill.data.draws import draw_test, draw_validation, stratified_order
from fastensdistill.errors import InputError
from tests.datasets import arrays, pairs, save


@pytest.mark.parametrize(("counts", "asked", "drawn"), [
    pytest.param([100] * 6, None, [10] * 6, id="balanced"),
    pytest.param([170, 10, 120, 90, 70, 140], None, [17, 1, 12, 9, 7, 14], id="imbalanced"),
    pytest.param([900, 90, 10], None, [90, 9, 1], id="far-from-balanced"),
    pytest.param([900, 3, 3], 20, [18, 1, 1], id="one-of-each-class-first"),
    pytest.param([50, 1, 1], None, [5, 0, 0], id="single-images-stay-in-training"),
    pytest.param([5] * 10, None, [1] * 10, id="small-classes-give-one-each"),
    pytest.param([2, 2, 2], 3, [1, 1, 1], id="half"),
    pytest.param([3, 2], 3, [2, 1], id="all-that-can-be-taken"),
])  # fmt: skip
@pytest.mark.parametrize("order", ["ascending", "blocks", "shuffled"])
def test_validation_has_every_class_in_proportion(counts, asked, drawn, order):
    labels = np.repeat(np.arange(len(counts)), counts)
    if order == "blocks":
        labels = np.concatenate([labels[len(labels) // 2 :], labels[: len(labels) // 2]])
    if order == "shuffled":
        labels = np.random.default_rng(3).permutation(labels)
    train, validation = draw_validation(labels, asked, "set")
    assert abs(np.bincount(labels[validation], minlength=len(counts)) - drawn).max() <= 1
    assert len(validation) == sum(drawn)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert (np.bincount(labels[train], minlength=len(counts)) > 0).all()
    again = draw_validation(labels, asked, "set")[1]
    assert np.array_equal(validation, again)


def test_the_draw_is_random_within_a_class():
    _, validation = draw_validation(np.zeros(1000, dtype=np.int64), 100, "set")
    assert 350 < validation.mean() < 650
    assert len(set(np.diff(validation).tolist())) > 5


def test_every_beginning_of_the_order_is_stratified():
    labels = np.repeat([0, 1, 2], [800, 150, 50])
    order = stratified_order(labels)
    assert sorted(order) == list(range(1000))
    assert sorted(labels[order[:3]]) == [0, 1, 2]
    for count in (20, 100, 400):
        assert abs(np.bincount(labels[order[:count]]) / count - [0.8, 0.15, 0.05]).max() <= 2 / count


@pytest.mark.parametrize(("labels", "asked", "message"), [
    pytest.param([0, 0, 1, 1], 3, "validation is 3; expected at most 2 of the 4 training images", id="too-many"),
    pytest.param([0, 1, 2], None, "one image in every class", id="single-images"),
])  # fmt: skip
def test_validation_that_would_take_all_of_a_class_is_refused(labels, asked, message):
    with pytest.raises(InputError, match=message):
        draw_validation(np.array(labels), asked, "set")


def test_a_test_split_is_a_fifth_of_every_class():
    labels = np.repeat([1, 0], [10, 3])
    train, test = draw_test(labels, ("a", "b"), 0, "set")
    assert np.bincount(labels[test]).tolist() == [1, 2]
    assert sorted([*train, *test]) == list(range(13))
    assert not np.array_equal(draw_test(labels, ("a", "b"), 1, "set")[1], test)
    with pytest.raises(InputError, match="class 'b' holds 1 image"):
        draw_test(np.array([0, 0, 1]), ("a", "b"), 0, "set")


@pytest.mark.parametrize("stored", ["sorted", "blocks"])
def test_images_stored_class_by_class(stored, tmp_path):
    content = arrays(count=400)
    labels = np.sort(content["train_labels"])
    content["train_labels"] = labels if stored == "sorted" else (labels + 2) % 4
    path = save(tmp_path / "set.npz", content)
    data, other, few = load_dataset(path), load_dataset(path, seed=1), load_dataset(path, limit=40)
    assert np.bincount(data.validation.labels).tolist() == [10] * 4
    assert np.bincount(few.train.labels).tolist() == [10] * 4
    assert pairs(other.validation) == pairs(data.validation) == pairs(few.validation)  # of no run's seed
    assert len({image for image, _ in pairs(data.train, data.validation)}) == 400
    assert "validation: 40 training images drawn class by class, always the same" in data.notes

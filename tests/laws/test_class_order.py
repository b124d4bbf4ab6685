"""Class names decide which class is which between data, teachers, initial weights and resumed runs."""

import numpy as np
import pytest

from cm_jax.checkpoints.published import imagenet_classes
from cm_jax.data import InMemory
from cm_jax.errors import InputError
from cm_jax.training.class_order import in_class_order, in_order_of_all, in_order_of_run

NAMES = ("cat", "dog", "emu")
IDS = tuple(f"n{number:08d}" for number in range(1000, 2000))


def data(names=NAMES, classes=3):
    return InMemory(np.zeros((classes, 1, 1, 3), np.uint8), np.arange(classes), class_names=names, classes=classes)


def test_labels_follow_their_names():
    dataset = data()
    ordered = in_class_order(dataset, ("emu", "cat", "dog"), "a teacher")
    assert ordered.class_names == ("emu", "cat", "dog")
    assert [ordered.class_names[label] for label in ordered.labels] == list(NAMES)
    assert ordered.description.endswith(", classes numbered as in a teacher")
    assert dataset.class_names == NAMES
    assert dataset.labels.tolist() == [0, 1, 2]
    again = in_class_order(ordered, NAMES, "another")
    assert again.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("names", [NAMES, ("Cat", "dog, Canis", "emu"), ()])
def test_equal_names_and_missing_names_change_nothing(names):
    dataset = data()
    assert in_class_order(dataset, names, "a teacher") is dataset
    assert in_class_order(data(()), NAMES, "a teacher").labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "names", [("cat", "dog", "fox"), ("cat", "dog"), ("cat", "cat", "dog"), ("cat", "dog", "emu", "fox")]
)
def test_other_names_are_refused_in_one_line(names):
    with pytest.raises(InputError, match="class names of the data differ from those of a teacher") as refused:
        in_class_order(data(), names, "a teacher")
    assert "\n" not in str(refused.value)


def test_wordnet_ids_are_the_names_of_imagenet():
    names = imagenet_classes()
    assert in_class_order(dataset := data(IDS, 1000), names, "a teacher") is dataset
    assert in_class_order(dataset := data(names, 1000), IDS, "a teacher") is dataset
    with pytest.raises(InputError, match="class names of the data differ"):
        in_class_order(data(IDS, 1000), names[::-1], "a teacher")  # two classes are named crane


def test_two_checkpoints_must_agree():
    turned = NAMES[::-1]
    assert in_order_of_all(data(), [("A", turned), ("B", turned), ("C", ())]).class_names == turned
    assert in_order_of_all(data(), [("A", ()), ("B", turned)]).class_names == turned
    for first, second in [(turned, NAMES), (NAMES, turned)]:
        with pytest.raises(InputError, match="A and B number the same classes differently"):
            in_order_of_all(data(), [("A", first), ("B", second)])


def test_a_resumed_run_keeps_its_order_and_warns_of_another_teacher(caplog):
    assert in_order_of_run(data(), NAMES[::-1], [("A", NAMES[::-1])]).labels.tolist() == [2, 1, 0]
    assert not caplog.text
    assert in_order_of_run(data(), NAMES[::-1], [("A", NAMES)]).labels.tolist() == [2, 1, 0]
    assert "numbers its classes differently from A" in caplog.text

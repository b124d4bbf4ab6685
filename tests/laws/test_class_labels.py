"""Class labels: every name and synonym gives its own class or is refused, as one label and in lists."""

import collections

import numpy as np
import pytest

from cm_jax.checkpoints.class_labels import class_numbers, described_classes, find_classes, split_labels
from cm_jax.checkpoints.published import imagenet_classes
from cm_jax.cli.labels import read_labels
from cm_jax.errors import InputError

NAMES = imagenet_classes()
SHARED = collections.Counter(word for name in NAMES for word in {part.casefold() for part in name.split(", ")})
"""Number of classes that have a synonym."""
NUMBERED = tuple(map(str, range(1, 11)))
"""Classes named 1 to 10, with the indices 0 to 9."""


def numbers(labels, names=NAMES, count=None):
    found = class_numbers(labels, count or (1 if isinstance(labels, str) else len(labels)), len(names), names)
    return found.tolist()


def test_every_whole_name_gives_its_own_class_in_any_case_and_spacing():
    for number, name in enumerate(NAMES):
        if name == "crane":  # a bird and a machine
            continue
        for text in (name, name.replace(", ", ","), f"  {name.replace(', ', ' , ')} "):
            assert split_labels(text, NAMES) == [", ".join(part.strip() for part in name.split(","))]
            assert numbers(text) == numbers(split_labels(text, NAMES)) == [number]
        if name != "cardigan":  # in another case a Welsh corgi, too
            assert numbers(name.upper()) == [number]


def test_every_synonym_gives_its_own_class_or_is_refused_with_the_choices():
    refused = 0
    for number, name in enumerate(NAMES):
        for synonym in name.split(", "):
            found = find_classes(synonym, NAMES)
            if SHARED[synonym.casefold()] == 1:
                assert numbers(synonym) == numbers(split_labels(synonym, NAMES)) == [number]
            elif len(found) == 1:  # the whole name of one of the classes
                assert NAMES[found[0]] == synonym
            else:
                refused += 1
                assert number in found
                with pytest.raises(InputError, match=rf"(?s)Several classes are named.*\b{number} \("):
                    numbers(synonym)
    assert refused == 29


def test_a_list_of_all_names_is_the_list_of_all_classes():
    known = [number for number, name in enumerate(NAMES) if name != "crane"]
    text = ",".join(NAMES[number] for number in known)
    assert numbers(split_labels(text, NAMES)) == known
    assert split_labels("145,king penguin, 3", NAMES) == ["145", "king penguin", "3"]
    assert split_labels("1,,2", NAMES) == ["1", "", "2"]
    assert split_labels("a, b", ("a", "b")) == ["a", "b"]
    assert split_labels("a,b", ("a,b", "c")) == ["a, b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cardigan, Cardigan Welsh corgi", [264]),
        ("harmonica, mouth organ, harp, mouth harp", [593]),
        ("harmonica, mouth organ", [593]),
        ("ruffed grouse, partridge, Bonasa umbellus", [82]),
        ("145, ruffed grouse,partridge, bonasa umbellus,harp", [145, 82, 594]),
        ("partridge,ruffed grouse", [86, 82]),
        ("cardigan", [474]),
        ("harp", [594]),
    ],
)
def test_names_with_commas(text, expected):
    assert numbers(split_labels(text, NAMES)) == expected


def test_synonyms_of_one_class_that_are_names_of_others_are_refused():
    with pytest.raises(InputError, match=r"may be the class 82 \(.*\) or the classes 82 \(.*\), 86 \(partridge\)"):
        split_labels("ruffed grouse, partridge", NAMES)
    assert read_labels(["ruffed grouse", "partridge"], NAMES) == ["ruffed grouse", "partridge"]


def test_composed_and_decomposed_unicode_are_the_same_name():
    assert numbers("re\u0301ne\u0301", ("r\u00e9n\u00e9", "tea")) == [0]


def test_a_number_is_an_index_and_the_class_of_this_name_is_told(capsys, caplog):
    told = "Label 2 was taken as an index: class '3'. The class named '2' has index 1."
    assert read_labels(["2", "king"], NUMBERED) == [2, "king"]
    assert capsys.readouterr().out == told + "\n"
    assert numbers("2", NUMBERED) == [2]
    assert told in caplog.text
    with pytest.raises(InputError, match=r"from 0 to 9, got 10\. The class named '10' has index 9"):
        numbers("10", NUMBERED)


@pytest.mark.parametrize("names", [(), tuple(map(str, range(10))), tuple("abcdefghij")])
def test_a_number_without_another_meaning_is_an_index_without_a_word(names, capsys, caplog):
    assert class_numbers(read_labels(["2"], names), 1, 10, names) == [2]
    assert class_numbers(2, 1, 10, NUMBERED) == [2]
    assert not capsys.readouterr().out
    assert not caplog.text


def test_json_lists_and_repeated_options():
    assert read_labels(['["tench, Tinca tinca", 3]', "crane fly, 7", ""], NAMES) == [
        "tench, Tinca tinca", 3, "crane fly", "7",
    ]  # fmt: skip
    assert read_labels(["[x]"], ("[x]", "y")) == ["[x]"]
    for text, message in [("[3", "expected a JSON list"), ("[]", "at least one class"), ("[" * 10**5, "JSON list")]:
        with pytest.raises(InputError, match=message):
            read_labels([text], NAMES)


@pytest.mark.parametrize(
    "labels",
    [
        1.0,
        True,
        None,
        b"1",
        {1: 2},
        {1},
        [True],
        [1.0],
        [None],
        [[1]],
        np.ones(1),
        np.ones((1, 1), int),
        np.array([None]),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_other_types_are_refused_in_one_line(labels):
    with pytest.raises(InputError, match="label") as refused:
        class_numbers(labels, 1, 1000, NAMES)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "labels", [range(3), (0, "1", np.int8(2)), np.arange(3, dtype=np.uint8), np.array(["0", "1", "2"]), ["tench", 1, 2]]
)
@pytest.mark.usefixtures("unchecked_types")
def test_sequences_of_indices_and_names(labels):
    assert class_numbers(labels, 3, 1000, NAMES).tolist() == [0, 1, 2]


def test_many_classes_are_described_by_a_few():
    assert described_classes(NAMES) == "0 tench; 1 goldfish; 2 great white shark; ...; 999 toilet tissue"
    with pytest.raises(InputError, match="its classes are 0 cat; 1 dog"):
        numbers("xxxx", ("cat", "dog"))

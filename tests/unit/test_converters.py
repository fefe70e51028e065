"""Formats of the user's own: a Python file with `CONVERTERS`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayloom.data.description import Description
from rayloom.data.example import Example, Message
from rayloom.data.formats import FORMATS, load_converters
from rayloom.errors import RequestError

PLAIN = Description()

CONVERTERS = """\
from rayloom.data.example import Example, Message

def quiz(row, description):
    if row["q"] == "no":
        raise ValueError("no such question")
    return Example((Message("user", row["q"]), Message("assistant", row[description.columns.response])))

CONVERTERS = {"quiz": quiz, "none": lambda row, description: None,
              "orderless": lambda row, description: Example((Message("assistant", "A"),))}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "own.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_converters_of_the_users_own(tmp_path):
    path = written(tmp_path, CONVERTERS)
    converters = load_converters(path)
    assert set(converters) == {"quiz", "none", "orderless"}
    assert load_converters(str(path)) is converters  # it is asked for every row
    assert converters["quiz"]({"q": "Q", "output": "A"}, PLAIN) == Example(
        (Message("user", "Q"), Message("assistant", "A"))
    )
    assert list(tmp_path.iterdir()) == [path]  # no __pycache__
    for name, row, message in [
        ("quiz", {"q": "no"}, "no such question"),
        ("quiz", {}, f"converter 'quiz' failed at {path}:4: KeyError: 'q'"),
        ("quiz", {"q": "Q", "output": 3}, f"converter 'quiz' failed at {path}: AttributeError: 'int' object has no "),
        ("none", {}, "converter 'none' returned NoneType, not Example"),
        ("orderless", {}, "wrong order of roles: turn 1 is from the assistant where the user is due "),
    ]:
        with pytest.raises(ValueError) as refused:  # noqa: PT011 (the message is compared)
            converters[name](row, PLAIN)
        assert str(refused.value).startswith(message)


def test_converters_are_read_again_when_the_file_has_changed(tmp_path):
    path = written(tmp_path, CONVERTERS)
    load_converters(path)
    written(tmp_path, CONVERTERS.replace('"quiz":', '"test":'))
    os.utime(path, (1, 1))
    assert "test" in load_converters(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef f(:\n", "HERE:2: not Python: invalid syntax"),
        ("import os\n1 / 0\n", "HERE:2: fails when it is run: ZeroDivisionError: division by zero"),
        ("", "HERE: has no dict CONVERTERS, such as CONVERTERS = {'quiz': from_quiz}"),
        ("CONVERTERS = {}", "HERE: has no dict CONVERTERS, such as CONVERTERS = {'quiz': from_quiz}"),
        ("CONVERTERS = {'a': 3}", "HERE: CONVERTERS['a'] must be a function of (row, description)"),
        ("CONVERTERS = {'a': lambda row: 3}", "HERE: CONVERTERS['a'] must be a function of (row, description)"),
        (
            "CONVERTERS = {'text': lambda row, description: 3}",
            "HERE: CONVERTERS['text']: Rayloom has a format of that name; choose another",
        ),
    ],
)
def test_converters_that_are_refused(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(RequestError) as refused:
        load_converters(path)
    assert str(refused.value) == "data.converters: " + message.replace("HERE", str(path))


def test_there_is_no_file_of_converters(tmp_path):
    with pytest.raises(RequestError, match=r"^data.converters: .*/nope.py: no such file$"):
        load_converters(tmp_path / "nope.py")


def test_no_converter_takes_a_name_of_rayloom(tmp_path):
    for name in ("auto", *FORMATS):
        path = written(tmp_path, f"CONVERTERS = {{{name!r}: lambda row, description: 3}}")
        os.utime(path, (len(name), len(name)))
        with pytest.raises(RequestError, match="choose another"):
            load_converters(path)

"""The classes of errors: each names a cause, and a bad request can be told from all others."""

import doctest

import pytest

from mpoe_convert import Export, Finetuning, Recipe, errors
from mpoe_convert.artifact.destination import Destination
from mpoe_convert.devices import pick_device
from mpoe_convert.errors import LibraryError, MpoeError, RequestError, one_line
from mpoe_convert.extras import need

BAD_REQUESTS = {
    "recipe": lambda: Recipe("model", experts=0),
    "fine-tuning": lambda: Finetuning("model", data=("text.txt",), steps=0),
    "export": lambda: Export(to="gguf"),
    "push": lambda: Destination("no-owner"),
    "device": lambda: pick_device("banana"),
}


@pytest.mark.parametrize("request_", BAD_REQUESTS)
def test_a_bad_request_is_a_request_error(request_):
    with pytest.raises(RequestError):
        BAD_REQUESTS[request_]()


def test_every_error_is_an_mpoe_error_with_a_cause_of_its_own():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(each, MpoeError) and each.__doc__ for each in classes)
    assert len({each.__doc__ for each in classes}) == len(classes)


def test_a_missing_library_is_told_with_the_extra_that_has_it():
    need("report", "json", extra="report")
    with pytest.raises(LibraryError) as told:
        need("report", "json", "no_such_library", extra="report")
    assert str(told.value) == (
        "report needs no_such_library: install them with pip install 'mpoe-convert[report]'"
    )


def test_one_line():
    assert doctest.testmod(errors).failed == 0
    assert one_line(ValueError()) == "ValueError"
    assert one_line("x" * 300, 10) == "xxxxxxx..."

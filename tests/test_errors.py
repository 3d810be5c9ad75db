"""Errors and warnings: what a person is told, and where from."""

import warnings

import pytest

from adapterhub_chat.errors import AdapterError, join_misfits
from adapterhub_chat.files import write_json


def test_a_warning_names_the_line_that_called_the_package(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        write_json(blocked / "log.json", {})
    (warning,) = seen
    assert warning.filename == __file__
    assert "cannot be written" in str(warning.message)


def test_misfits_are_kept_as_a_list_also_where_one_holds_the_separator():
    misfits = ["one\n  - is odd", "two"]
    error = AdapterError(join_misfits("an adapter", misfits), misfits)
    assert list(error.misfits) == misfits
    with pytest.raises(AdapterError, match="an adapter"):
        raise error

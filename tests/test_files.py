"""Files and folders that are replaced or made in one step: what a reader sees before, during and after."""

import pytest

from adapterhub_chat import files
from adapterhub_chat.files import new_folder, replaced_file, scratch_prefix


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_when_its_block_ends(tmp_path, monkeypatch, durable):
    synced = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name))
    path = tmp_path / "log.json"
    path.write_text("old")
    with replaced_file(path, durable=durable) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
        assert scratch.name == path.name
        assert scratch.parent.name.startswith(scratch_prefix(path))
    assert path.read_text() == "new"
    assert synced == ["log.json"] * durable
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_keeps_its_content_when_its_block_raises(tmp_path, error):
    path = tmp_path / "log.json"
    path.write_text("old")

    def fail():
        with replaced_file(path) as scratch:
            scratch.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_its_block_does_not_write_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replaced_file(tmp_path / "log.json"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_when_its_block_ends(tmp_path):
    path = tmp_path / "model"
    with new_folder(path) as scratch:
        (scratch / "weights").write_text("1")
        (scratch.parent / "download").write_text("temporary")
        assert not path.exists()
    assert (path / "weights").read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_does_not_appear_when_its_block_raises(tmp_path):
    def fail():
        with new_folder(tmp_path / "model") as scratch:
            (scratch / "weights").write_text("half")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exist_ok", [False, True])
def test_a_folder_of_another_process_is_kept(tmp_path, exist_ok):
    path = tmp_path / "model"

    def make():
        with new_folder(path, exist_ok=exist_ok) as scratch:
            (scratch / "weights").write_text("second")
            path.mkdir()
            (path / "weights").write_text("first")

    if exist_ok:
        make()
    else:
        with pytest.raises(OSError, match="not empty"):
            make()
    assert (path / "weights").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]

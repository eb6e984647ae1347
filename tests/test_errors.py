"""Files that are never half-written, and errors without a traceback."""

import os

import pytest

from tooln1.io.errors import Stopped, UserError, exit_on_user_error
from tooln1.io.files import atomic_directory, atomic_write, remove_temporaries


def test_a_file_is_replaced_only_when_the_block_succeeds(tmp_path):
    target = tmp_path / "sub" / "file.txt"
    with atomic_write(target) as file:
        file.write("one")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_write(target) as file:
        file.write("two")
        raise RuntimeError("killed")
    assert target.read_text() == "one" and os.listdir(target.parent) == ["file.txt"]


def test_a_directory_is_replaced_only_when_the_block_succeeds(tmp_path):
    target = tmp_path / "model"
    for text in ("old", "new"):
        with atomic_directory(target) as folder:
            (folder / text).write_text(text)
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        (folder / "broken").touch()
        raise RuntimeError("killed")
    assert os.listdir(target) == ["new"] and os.listdir(tmp_path) == ["model"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".model.tmp").mkdir()
    for file in (".log.tmp", ".stranger.tmp"):
        (tmp_path / file).touch()
    assert remove_temporaries(tmp_path, ("log", "mod*")) == [".log.tmp", ".model.tmp"]
    assert os.listdir(tmp_path) == [".stranger.tmp"]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("config.toml: there is no setting 'lr'."), 2, "error: config.toml: there is no setting 'lr'.\n"),
        (KeyboardInterrupt(), 130, ""),
        (Stopped(15), 143, ""),
    ],
)
def test_exit_codes(capsys, error, code, told):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        exit_on_user_error(main)
    assert stop.value.code == code and capsys.readouterr().err == told


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_on_user_error(lambda: 1 / 0)

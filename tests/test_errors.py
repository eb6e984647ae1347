"""Files that are never half-written, and errors without a traceback."""

import pytest

from tooln1.io.errors import Stopped, UserError, exit_on_user_error
from tooln1.io.files import atomic_directory, atomic_write


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "sub" / "file.txt"
    with atomic_write(target) as file:
        file.write("one")
        assert not target.exists()
    assert target.read_text() == "one"
    with pytest.raises(RuntimeError), atomic_write(target) as file:
        file.write("two")
        raise RuntimeError("killed")
    assert target.read_text() == "one"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]
    assert target.stat().st_mode & 0o777 == 0o644 & ~_umask()


def _umask():
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_directory_takes_the_place_of_the_old_one_only_when_whole(tmp_path):
    target = tmp_path / "model"
    for text in ("old", "new"):
        with atomic_directory(target) as folder:
            (folder / "weights").write_text(text)
    assert (target / "weights").read_text() == "new"
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        (folder / "weights").write_text("broken")
        raise RuntimeError("killed")
    assert (target / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_user_error_is_one_sentence_and_exit_code_2(capsys):
    def mistaken():
        raise UserError("config.toml: there is no setting 'lr'.")

    with pytest.raises(SystemExit) as stop:
        exit_on_user_error(mistaken)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: config.toml: there is no setting 'lr'.\n"
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        exit_on_user_error(lambda: 1 / 0)


@pytest.mark.parametrize("error,code", [(KeyboardInterrupt(), 130), (Stopped(15), 143)])
def test_a_stop_by_a_signal_is_an_exit_code_without_traceback(error, code):
    def stopped():
        raise error

    with pytest.raises(SystemExit) as stop:
        exit_on_user_error(stopped)
    assert stop.value.code == code

import os
import stat

import pytest

from phi3_jax.checkpoint.atomic_write import new_file, new_folder


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_appears_whole_with_the_permissions_of_new_files(tmp_path, umask):
    path = tmp_path / "a.txt"
    with new_file(path) as partial:
        partial.write_text("all")
        assert not path.exists()
    assert (path.read_text(), mode(path)) == ("all", 0o640)
    assert os.umask(0o027) == 0o027  # reading the umask has not changed it
    with new_file(tmp_path / "b.txt", private=True) as partial:
        partial.write_text("")
    assert mode(tmp_path / "b.txt") == 0o600
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad"), OSError(28, "No space left on device")])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with new_file(path, 5_000_000, overwrite=True) as partial:
            partial.write_text("new")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    if isinstance(error, OSError):
        assert str(caught.value) == (
            f"{path}: cannot be written (No space left on device); name a file in a folder that is there and may be "
            "written to, with 5.00 MB left"
        )
    assert (os.listdir(tmp_path), path.read_text()) == (["a.txt"], "old")


def test_nothing_is_replaced_unless_asked_for(tmp_path):
    path = tmp_path / "a.txt"
    path.symlink_to(tmp_path / "nowhere")
    for context in (new_file(path), new_folder(path, 0)):
        with pytest.raises(FileExistsError, match=r"a\.txt: exists already"), context:
            pass
    with new_file(path, overwrite=True) as partial:
        partial.write_text("through the link")
    assert path.is_symlink()
    assert (tmp_path / "nowhere").read_text() == "through the link"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with new_file(path, overwrite=True) as partial:
        partial.write_text("figures")
    assert os.read(reader, 100) == b"figures"
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path):
    for context in (new_file(tmp_path / "a", 10**18), new_folder(tmp_path / "a", 10**18)):
        with pytest.raises(OSError, match=r"a: takes 1000000000\.00 GB, but only .* are free there"), context:
            pass
    assert not list(tmp_path.iterdir())

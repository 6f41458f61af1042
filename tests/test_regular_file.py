"""What is no regular file is named and refused without being opened."""

import os
import socket
from pathlib import Path

import pytest

from phi3_jax import regular_file
from phi3_jax.json_files import read_object
from phi3_jax.regular_file import require_regular


def test_files_and_links_to_them_pass(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("file")
    require_regular(tmp_path / "file")
    require_regular(tmp_path / "link")


def test_what_is_missing_stays_missing(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("missing", "link"):
        with pytest.raises(FileNotFoundError, match=name):
            require_regular(tmp_path / name)


def test_pipes_devices_sockets_and_folders_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket has room for 108 bytes
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    Path("folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for path, what in {
            "pipe": "a named pipe",
            "link": "a named pipe",
            "folder": "a folder",
            "socket": "a socket",
            "/dev/zero": "a device",
        }.items():
            with pytest.raises(ValueError, match=f"^{path}: is {what}; a regular file is needed here$"):
                require_regular(Path(path))


def test_a_text_may_come_from_a_pipe_but_must_end(tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\xe2\x82\xac")
    assert regular_file.read_text(str(path)) == "one\ntwo€"
    reading, writing = os.pipe()
    os.write(writing, b"three")
    os.close(writing)
    assert regular_file.read_text(f"/dev/fd/{reading}") == "three"
    os.close(reading)
    monkeypatch.setattr(regular_file, "_LONGEST_TEXT", 1000)
    with pytest.raises(ValueError, match=r"^/dev/zero: longer than 1000 bytes"):
        regular_file.read_text("/dev/zero")


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_a_pipe_that_a_shell_has_opened_is_read(folder):
    if not Path(folder).exists():
        pytest.skip(f"there is no {folder}")
    read, write = os.pipe()
    with os.fdopen(read), os.fdopen(write, "w") as file:
        file.write('{"a": [1]}')
        file.close()
        assert read_object(Path(folder, str(read))) == {"a": [1]}

"""The cache folder: where it is, and that what others could have written there is not trusted."""

import contextlib
import grp
import os
import pwd
from pathlib import Path

import pytest

from phi3_jax import user_cache
from phi3_jax.user_cache import UntrustedError, cache_folder, check_private, private_cache_folder

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")


@pytest.fixture
def base(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def private(told=None):
    return private_cache_folder("kernels", "key", told=(lambda text: None) if told is None else told.append)


@pytest.mark.parametrize("given", ["", "cache", "./cache", "~/cache", "../cache"])
def test_a_relative_xdg_cache_home_is_ignored(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder("kernels") == tmp_path / "home" / ".cache" / "phi3_jax" / "kernels"
    assert private() == tmp_path / "home" / ".cache" / "phi3_jax" / "kernels" / "key"
    assert os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize("home", ["", "nowhere", "."])
def test_without_a_home_an_error_says_what_to_set(home, monkeypatch):
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(OSError, match="set XDG_CACHE_HOME to the absolute path"):
        cache_folder()


def test_folders_are_made_for_the_user_alone_whatever_the_mask(base):
    base.rmdir()
    before = os.umask(0)
    try:
        made = private()
    finally:
        os.umask(before)
    for folder in (made, made.parent, made.parent.parent, base):
        assert folder.stat().st_mode & 0o777 == 0o700


@needs_root
@pytest.mark.parametrize("name_of", [".", "phi3_jax"])
def test_a_group_of_the_users_name_alone_may_write(name_of, base, monkeypatch):
    (private() / "kept").write_text("")
    os.chown(base / name_of, 0, 54321)
    (base / name_of).chmod(0o775)
    me = pwd.getpwuid(0).pw_name
    for name, members, is_own in [(me, [], True), (me, [me], True), (me, [me, "eve"], False), ("staff", [], False)]:
        monkeypatch.setattr(grp, "getgrgid", lambda _, g=(name, "x", 54321, members): grp.struct_group(g))
        with contextlib.nullcontext() if is_own else pytest.raises(UntrustedError, match="do: chmod go-w"):
            check_private(base / name_of)
        assert not is_own or os.listdir(private()) == ["kept"]
    monkeypatch.undo()
    with pytest.raises(UntrustedError, match="others may write to"):  # there is no such group
        check_private(base / name_of)


@pytest.mark.parametrize(
    ("mode", "group"),
    [
        (0o757, -1),
        (0o1777, -1),
        pytest.param(0o770, 54321, marks=needs_root),
        pytest.param(0o720, 54321, marks=needs_root),
    ],
)
@pytest.mark.parametrize("name", ["phi3_jax", "phi3_jax/kernels", "phi3_jax/kernels/key"])
def test_what_others_could_write_is_replaced_by_an_empty_folder(name, mode, group, base):
    (private() / "planted.so").write_text("")
    (base / name / "folder").mkdir()
    os.chown(base / name, -1, group)
    (base / name).chmod(mode)
    told = []
    assert list(private(told).iterdir()) == []
    assert (base / name).stat().st_mode & 0o777 == 0o700
    assert told == [f"others could write to {base / name}: what it held was removed, and it is private now"]
    assert not list(base.rglob("folder"))
    assert not list(base.rglob(".*-*"))  # nothing is left of what was put aside


def test_what_others_can_only_read_stays_until_something_is_written(base):
    kept = private() / "file"
    kept.write_text("")
    for folder in list(kept.parents)[:3]:
        folder.chmod(0o755)
    assert private() == kept.parent
    assert kept.exists()
    user_cache.close_to_others(kept.parent)
    assert [folder.stat().st_mode & 0o777 for folder in list(kept.parents)[:3]] == [0o700] * 3
    assert kept.exists()


@pytest.mark.parametrize("name", ["phi3_jax", "phi3_jax/kernels", "phi3_jax/kernels/key"])
def test_a_symbolic_link_is_not_followed(name, base, tmp_path):
    private().joinpath("file").write_text("")
    (base / name).rename(tmp_path / "elsewhere")
    (base / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UntrustedError, match=f"{name} is a symbolic link; remove it, and set XDG_CACHE_HOME"):
        private()
    assert len(list((tmp_path / "elsewhere").rglob("file"))) == 1


def test_the_folder_above_may_be_a_link_but_not_open_to_all(base, tmp_path):
    base.rename(tmp_path / "disk")
    base.symlink_to(tmp_path / "disk")
    private()
    (tmp_path / "disk").chmod(0o777)
    with pytest.raises(UntrustedError, match=f"others may write to {base}.*chmod go-w {base}"):
        private()
    (tmp_path / "disk").chmod(0o1777)  # as /tmp: nobody else can rename what is ours
    private()


@needs_root
@pytest.mark.parametrize("name", ["", "phi3_jax", "phi3_jax/kernels", "phi3_jax/kernels/key"])
def test_another_users_folder_is_refused(name, base):
    private()
    os.chown(base / name, 1234, 1234)
    with pytest.raises(UntrustedError, match=r"belongs to user 1234; set XDG_CACHE_HOME to a folder of your own"):
        private()


@needs_root
def test_a_group_of_several_may_not_write_to_the_folder_above(base):
    base.chmod(0o770)
    private()  # the group of this user alone
    os.chown(base, 0, 1234)
    with pytest.raises(UntrustedError, match="others may write"):
        private()


def test_a_file_in_the_place_of_a_folder_is_named(base):
    Path(base, "phi3_jax").write_text("")
    with pytest.raises(OSError, match="is not a folder; remove it"):
        private()

"""The output folder is proven before any work, and no run overwrites another."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from resbackbone.errors import InputError
from resbackbone.runtime.output import RUN_FILES, prepare_output


@pytest.mark.parametrize("resume", [None, "auto"])
def test_new_and_empty_folders(tmp_path: Path, resume: str | None) -> None:
    for _ in range(2):
        assert prepare_output(tmp_path / "deep" / "out", resume=resume) == tmp_path / "deep" / "out"
        assert os.listdir(tmp_path / "deep" / "out") == []


@pytest.mark.parametrize("name", RUN_FILES)
def test_another_run_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=rf"another run is in this folder \({name}\); go on with it by --resume auto, or choose another"):
        prepare_output(tmp_path)
    assert prepare_output(tmp_path, resume="auto") == tmp_path


def test_unrelated_files_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert prepare_output(tmp_path) == tmp_path


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="this is a file; give a folder"):
        prepare_output(tmp_path / "out")
    with pytest.raises(InputError, match="a file stands where a folder is needed"):
        prepare_output(tmp_path / "out" / "deeper")


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.EROFS, "this folder cannot be written"), (errno.EACCES, "this folder cannot be written"), (errno.ENOSPC, "full")],
)
def test_a_folder_that_only_writing_shows_to_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    def refuse(path: Path, data: bytes) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(InputError, match=words):
        prepare_output(tmp_path / "out")


def test_a_folder_the_kernel_keeps_read_only() -> None:
    # /proc refuses new files even to root.
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc here")
    with pytest.raises(InputError, match="choose another --output"):
        prepare_output("/proc/self/out")

"""Whole files or none, and storage errors in the user's words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from resbackbone.errors import InputError
from resbackbone.runtime import atomic
from resbackbone.runtime.atomic import describe_storage_error, storage_errors, write_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    write_atomically(path, b"one")
    write_atomically(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["x.json"]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_failure_keeps_the_old_content_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, b"one")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, operation, fail)
        with pytest.raises(InputError, match=r"the disk is full \(5\.0 MB are needed, [\d.]+ MB free\); free some space"):
            write_atomically(path, b"12345" * 10**6)
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file stands where a folder is needed"):
        write_atomically(tmp_path / "file" / "x.json", b"")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full ("),
        (errno.EDQUOT, "the disk is full ("),
        (errno.EROFS, "this folder cannot be written (Read-only file system)"),
        (errno.EACCES, "this folder cannot be written (Permission denied)"),
        (errno.EIO, "writing failed (Input/output error)"),
    ],
)
def test_each_error_in_words(tmp_path: Path, code: int, words: str) -> None:
    message = describe_storage_error(OSError(code, os.strerror(code)), tmp_path / "not" / "there")
    assert message.startswith(f"{tmp_path / 'not' / 'there'}: {words}")
    assert "choose another --output" in message


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage_errors(tmp_path):
        _ = 1 / 0

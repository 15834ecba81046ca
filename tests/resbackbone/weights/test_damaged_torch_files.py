"""torch files that are cut off, or would run code: one error that says what to do, and never torch's advice to load them unsafely."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resbackbone.errors import InputError
from resbackbone.weights.files import read_state_dict


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_off_anywhere_is_refused(legacy: bool, tmp_path: Path) -> None:
    """Which error torch raises depends on the byte, and where a byte lies in a legacy file on addresses in memory."""
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(2, 2), "b.c": torch.zeros(3)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="again") as caught:
            read_state_dict(path)
        assert "weights_only" not in str(caught.value)


def test_a_file_that_would_run_code_is_refused_by_name(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> tuple:
            return print, ("run",)

    torch.save({"a": Command()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"asks for \S*print\S*; nothing else in it is run") as caught:
        read_state_dict(tmp_path / "w.pth")
    assert "weights_only" not in str(caught.value)

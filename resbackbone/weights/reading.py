"""What readers of checkpoints share: errors that say what to do, and where a checkpoint keeps its tensors."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from resbackbone.errors import InputError

NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the tensors of a larger checkpoint
# What a cut-off or foreign file breaks first, a number, a key or a stack, depends on the byte where it breaks.
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, OSError, EOFError, RuntimeError, struct.error)


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Makes what goes wrong while `path` is read an InputError that names it; one that is raised within needs no path of its own."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path} is not a whole {kind} ({reason}); copy or download it again, or convert it to .safetensors") from error


def refusal(deed: str) -> InputError:
    """For a file that asks for more than data."""
    return InputError(
        f"{deed}; nothing in it is run, because it could be harmful. "
        "If you trust its source, save the state_dict alone there, as .safetensors"
    )


def find_state_dict(content: Any, tensor_of: Callable[[Any], Any] = lambda value: value) -> dict[str, Tensor]:
    """The state dict in what was saved: the content itself, or the entry of a checkpoint that holds it. `tensor_of` unwraps its values."""
    for _ in NESTED:  # one within another; a dict may also lie within itself
        if isinstance(content, Mapping):
            content = next((content[place] for place in NESTED if isinstance(content.get(place), Mapping)), content)
    found = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        tensors = {name: tensor_of(value) for name, value in content.items()}
        wrong = [name for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
        if tensors and not wrong:
            return tensors
        names = ", ".join(str(name)[:80] for name in list(tensors)[:5])
        found = f"{str(wrong[0])[:80]!r}, which is no tensor, in a dict with {names}" if wrong else "nothing"
    raise InputError(f"holds {found} where tensors belong: this is not a state dict (looked in {', '.join(NESTED)} as well)")

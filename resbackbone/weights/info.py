"""What a weights file says of itself: the network it belongs to and the images it expects. Travels in a safetensors file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

ALIASES = {"architecture": ("arch",), "norm_eps": ("bn_eps",), "color_order": ("colour_order",)}  # other people's spelling


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """Facts that tensors alone don't tell. An empty or None field: the source doesn't say.

    Args:
        architecture: a name of `list_backbones()`.
        variant: v1 | v1.5 | v2.
        shortcut: A | B | C.
        norm_eps: the epsilon of its batch norms.
        color_order: RGB | BGR.
        mean, std: per channel, of images whose white is `input_range`.
        input_range: the value of white before mean and std, 1 or 255.
        classes: the names of the classifier's outputs, in order.
    """

    architecture: str = ""
    variant: str = ""
    shortcut: str = ""
    norm_eps: float | None = None
    color_order: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    input_range: float | None = None
    classes: tuple[str, ...] = ()

    def to_metadata(self) -> dict[str, str]:
        """As safetensors keeps it, text to text; what isn't known is left out."""
        numbers = {"norm_eps": self.norm_eps, "input_range": self.input_range}
        lists = {"mean": self.mean, "std": self.std}
        return {
            **{name: value for name in ("architecture", "variant", "shortcut", "color_order") if (value := getattr(self, name))},
            **{name: repr(value) for name, value in numbers.items() if value is not None},
            **{name: ",".join(map(repr, values)) for name, values in lists.items() if values},
            **({"classes": json.dumps(self.classes)} if self.classes else {}),
        }

    def completed_by(self, other: WeightsInfo) -> WeightsInfo:
        """These facts, and the other's where this one has none."""
        names = self.__dataclass_fields__
        return WeightsInfo(**{name: getattr(self if getattr(self, name) not in ("", None, ()) else other, name) for name in names})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> WeightsInfo:
        """What can be understood of a file's metadata; the rest, which anybody may have written there, is passed over."""
        found = {name: _first(metadata, name) for name in cls.__dataclass_fields__}
        return cls(
            architecture=found["architecture"],
            variant=found["variant"],
            shortcut=found["shortcut"],
            norm_eps=_number(found["norm_eps"]),
            color_order=found["color_order"].upper(),
            mean=_numbers(found["mean"]),
            std=_numbers(found["std"]),
            input_range=_number(found["input_range"]),
            classes=_names(found["classes"]),
        )


def _first(metadata: Mapping[str, str], name: str) -> str:
    return next((metadata[key].strip() for key in (name, *ALIASES.get(name, ())) if key in metadata), "")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _numbers(text: str) -> tuple[float, ...]:
    values = [_number(part) for part in text.split(",")]
    return () if None in values else tuple(value for value in values if value is not None)


def _names(text: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except json.JSONDecodeError:
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()

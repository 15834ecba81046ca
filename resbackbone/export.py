"""Networks as files that run without this package: ONNX and torch.export programs, checked against the network they come from.

A file that disagrees with its network is removed: nobody should find out later.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resbackbone.backbone import Backbone
from resbackbone.convert import create_from_file
from resbackbone.errors import InputError, nearest

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
MAX_IMAGES, MAX_SIDE = 1024, 4096  # what a program is promised to take
BACKBONE_SIZES = ((96, 128), (160, 224))
SAME_FEATURES = 1e-3  # of a map's largest value: float32 sums in another order, over a hundred layers
Run = Callable[..., list[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What is exported: a module, one example of its inputs, which of their sides vary, names, and what a user of the file must know.

    shapes: as torch.export's dynamic_shapes. translations: for ONNX, torch operators and how to write them.
    """

    module: nn.Module
    example: tuple[Tensor, ...]
    shapes: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: dict[str, str]
    translations: dict[Callable, Callable] | None = None


def check_format(to: str) -> None:
    """Raise InputError unless `to` is a format whose packages are here."""
    if to not in ENDINGS:
        raise InputError(f"--to {to} is not known;{nearest(to, ENDINGS)} choose from {', '.join(ENDINGS)}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if to == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--to onnx needs {', '.join(missing)}, not installed here: pip install 'resbackbone[export]'")


def output_path(weights: Path, output: Path | None, to: str) -> Path:
    """Where to write: beside the weights where nobody says. Raises InputError for an ending that belongs to another format."""
    if output is None:
        return weights.with_suffix(ENDINGS[to])
    if output.suffix != ENDINGS[to]:
        raise InputError(f"{output}: --to {to} writes {ENDINGS[to]} files; give the file that ending")
    return output


def write_program(graph: Graph, path: Path, *, to: str) -> None:
    """Trace the module and write it; the file holds the weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporters' notes on their own future
        program = torch.export.export(graph.module, graph.example, dynamic_shapes=graph.shapes)
        if to == "torch-export":
            torch.export.save(program, path, extra_files={"metadata.json": json.dumps(graph.metadata)})
            return
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=graph.inputs,
            output_names=graph.outputs,
            custom_translation_table=graph.translations,
        )
    assert written is not None
    written.model.metadata_props.update(graph.metadata)
    written.save(path, external_data=False)


def open_program(path: Path, *, to: str) -> Run:
    """A function from input arrays to output arrays that runs the file: with ONNX Runtime on the CPU, or torch."""
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))
    program = torch.export.load(path).module()

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in program(*map(torch.from_numpy, inputs))]

    return run


def refuse(path: Path, why: str) -> InputError:
    """Remove the file; the error to raise."""
    path.unlink(missing_ok=True)
    return InputError(f"{path} was written, doesn't agree with the network it comes from, and was removed: {why}")


class _Maps(nn.Module):
    """A backbone whose maps come as a tuple."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images).values())


def backbone_graph(backbone: Backbone) -> Graph:
    """Normalised images (N, C, H, W) float32, any number, sides multiples of the deepest map's stride → the feature maps by name."""
    channels = len(backbone.preprocessing.mean)
    deepest = max(info.stride for info in backbone.feature_info.values())
    # Whole cells, and two of them at least: torch.export can't see that all ways through a block round odd sides alike.
    rows, columns = (torch.export.Dim(name, min=2, max=MAX_SIDE // deepest) for name in ("rows", "columns"))
    images = torch.export.Dim("images", min=1, max=MAX_IMAGES)
    said = backbone.preprocessing
    return Graph(
        module=_Maps(backbone).eval(),
        example=(torch.zeros(2, channels, *BACKBONE_SIZES[0]),),
        shapes={"images": {0: images, 2: deepest * rows, 3: deepest * columns}},
        inputs=("images",),
        outputs=backbone.out_features,
        metadata={
            "architecture": backbone.architecture,
            "divisor": str(deepest),
            "mean": json.dumps(said.mean),
            "std": json.dumps(said.std),
            "color_order": said.color_order,
            "input_range": json.dumps(said.input_range),
        },
    )


def export_backbone(weights: Path, *, to: str, output: Path | None = None, name: str | None = None, variant: str | None = None) -> str:
    """Export the feature maps of the network in a weights file of any format, check them at two sizes and two batch sizes, say how it went.

    Raises InputError where the file can't be read or the program's maps differ (and then removes the program).
    """
    check_format(to)
    path = output_path(weights, output, to)
    backbone = create_from_file(weights, name=name, variant=variant).eval()
    graph = backbone_graph(backbone)
    write_program(graph, path, to=to)
    worst = compare_maps(backbone, open_program(path, to=to), _noise(graph.example[0].shape[1]))
    if not worst <= SAME_FEATURES:
        raise refuse(path, f"a map differs by {worst:.1e} of its largest value, more than {SAME_FEATURES:.0e}")
    sizes = ", ".join(f"{height}×{width}" for height, width in BACKBONE_SIZES)
    return f"{path}: {', '.join(backbone.out_features)} equal to {worst:.1e} of each map's largest value, at {sizes} and 1 and 2 images"


def _noise(channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((count, channels, *size), generator=generator) for size in BACKBONE_SIZES for count in (1, 2)]


@torch.no_grad()
def compare_maps(backbone: Backbone, run: Run, batches: Iterable[Tensor]) -> float:
    """The largest difference between the backbone's maps and the program's, as a part of the map's largest value."""
    worst = 0.0
    for images in batches:
        theirs: Sequence[np.ndarray] = run(images.numpy())
        for mine, other in zip(backbone(images).values(), theirs, strict=True):
            difference = (mine - torch.from_numpy(other)).abs().max() / mine.abs().max().clamp(min=1e-12)
            worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst

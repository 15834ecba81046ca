"""Networks as files that run without this package: ONNX and torch.export programs, checked against the network they come from.

A file that disagrees with its network never gets its name: nobody should find out later.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resbackbone.backbone import Backbone, Preprocessing
from resbackbone.convert import create_from_file
from resbackbone.errors import InputError, nearest
from resbackbone.runtime.atomic import storage_errors, sync_folder

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
MAX_IMAGES, MAX_SIDE = 1024, 4096  # what a program is promised to take
BACKBONE_SIZES = ((96, 128), (160, 224))
PICTURE_SIDES = (224, 448)  # of a real image: its shorter side, unless the longer would pass the second
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


@contextmanager
def checked_file(path: Path) -> Iterator[Path]:
    """Where to write a program and check it: a folder beside `path`, from which it takes its place when the block ends well.

    Whatever is raised inside, an earlier file at `path` stays as it is and nothing else is left. Raises InputError for a full disk, a
    read-only folder, or a path that can't be a file.
    """
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InputError(f"{path} is a folder; give a file in it")
        # A folder, since ONNX puts weights of gigabytes into a second file, which the first calls by its name.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.tmp-", dir=path.parent) as folder:
            yield Path(folder) / path.name
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.parent / file.name)
            sync_folder(path.parent)


def write_program(graph: Graph, path: Path, *, to: str) -> None:
    """Trace the module and write it; the file holds the weights."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporters' notes on their own future
        program = torch.export.export(graph.module, graph.example, dynamic_shapes=graph.shapes)
        if to == "torch-export":
            buffer = io.BytesIO()  # given a path, torch's writer ends the whole process where the disk is full
            torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(graph.metadata)})
            path.write_bytes(buffer.getbuffer())
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


def refusal(path: Path, why: str) -> InputError:
    """The error to raise where a program differs."""
    return InputError(f"{path} was not written: the program doesn't agree with the network it comes from: {why}")


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


def export_backbone(
    weights: Path,
    *,
    to: str,
    output: Path | None = None,
    pictures: Sequence[np.ndarray] = (),
    name: str | None = None,
    variant: str | None = None,
) -> str:
    """Export the feature maps of the network in a weights file of any format, check them, say how it went.

    Checked on noise of two sizes and two batch sizes, and on `pictures`, uint8 (H, W, 3) RGB of any size, each beside its mirror image.
    Raises InputError where the weights can't be read, the file can't be written or the program's maps differ (nothing is then written).
    """
    check_format(to)
    path = output_path(weights, output, to)
    backbone = create_from_file(weights, name=name, variant=variant).eval()
    graph = backbone_graph(backbone)
    divisor = int(graph.metadata["divisor"])
    with checked_file(path) as program:
        write_program(graph, program, to=to)
        noise = _noise(graph.example[0].shape[1])
        real = (prepared(picture, backbone.preprocessing, divisor=divisor) for picture in pictures)
        worst = compare_maps(backbone, open_program(program, to=to), (*noise, *real))
        if not worst <= SAME_FEATURES:
            raise refusal(path, f"a map differs by {worst:.1e} of its largest value, more than {SAME_FEATURES:.0e}")
    sizes = ", ".join(f"{height}×{width}" for height, width in BACKBONE_SIZES)
    seen = f"at {sizes} and 1 and 2 images" + (f" of noise, and on {len(pictures)} real images" if pictures else "")
    return f"{path}: {', '.join(backbone.out_features)} equal to {worst:.1e} of each map's largest value, {seen}"


def _noise(channels: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((count, channels, *size), generator=generator) for size in BACKBONE_SIZES for count in (1, 2)]


def prepared(picture: np.ndarray, said: Preprocessing, *, divisor: int) -> Tensor:
    """uint8 (H, W, 3) RGB → (2, C, h, w): the picture and its mirror image as the weights want them, sides multiples of `divisor`.

    For other than three channels, their average in each.
    """
    scale = min(PICTURE_SIDES[0] / min(picture.shape[:2]), PICTURE_SIDES[1] / max(picture.shape[:2]))
    size = [divisor * max(2, round(side * scale / divisor)) for side in picture.shape[:2]]
    whole = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    image = nn.functional.interpolate(whole, size=size, mode="bilinear", antialias=True)
    image = image.flip(1) if said.color_order == "BGR" else image
    image = image if len(said.mean) == 3 else image.mean(dim=1, keepdim=True).expand(-1, len(said.mean), -1, -1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (said.mean, said.std))
    return (torch.cat((image, image.flip(3))) * said.input_range - mean) / std


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

"""Any weights file, whoever wrote it: which format it is in, told by its content, and its tensors under our names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from resbackbone.errors import InputError
from resbackbone.weights.caffe import from_caffe, read_caffe
from resbackbone.weights.detectron2 import from_detectron2, looks_like_detectron2, read_detectron2
from resbackbone.weights.files import first_bytes, read_state_dict
from resbackbone.weights.info import WeightsInfo
from resbackbone.weights.keras import from_keras, read_keras
from resbackbone.weights.timm import from_timm, looks_like_timm

HDF5 = b"\x89HDF"
TORCH_PICKLE = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9"  # torch's magic number, two bytes into its legacy files
COUNTER = "num_batches_tracked"
CIFAR_HEAD = "linear."  # what the best-known CIFAR networks call fc


def read_weights(path: str | Path, wanted: Collection[str] = ()) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Tensors under our names, as they were stored, and what the file says of itself.

    wanted: the names of the module they are for. A state dict that has them all stays as it is: it is that module's own.

    Takes safetensors and torch files (zip, legacy, torch 0.1's tar) with torchvision's, timm's, detectron2's or our own names;
    detectron2's .pkl, Caffe's .caffemodel, Keras's .h5. Raises InputError as the reader of that format does.
    """
    path = Path(path)
    start = first_bytes(path)
    if start.startswith(HDF5):
        return from_keras(read_keras(path), str(path))
    if path.suffix == ".caffemodel":
        return from_caffe(read_caffe(path), str(path))
    is_safetensors = start[8:9] == b"{"  # after its header's length, which may begin like a pickle
    if start[:1] == b"\x80" and not is_safetensors and start[2:9] != TORCH_PICKLE:
        return from_detectron2(read_detectron2(path))
    tensors, metadata = read_state_dict(path)
    wanted = {name for name in wanted if not name.endswith(COUNTER)}
    own = bool(wanted) and wanted <= tensors.keys()
    try:
        renamed, shown = _under_our_names(tensors)
    except InputError:
        if not own:
            raise
        renamed, shown = tensors, WeightsInfo()
    if own and not wanted <= renamed.keys():
        renamed, shown = tensors, WeightsInfo()
    return renamed, WeightsInfo.from_metadata(metadata).completed_by(shown)


def _under_our_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], WeightsInfo]:
    if looks_like_detectron2(tensors):
        return from_detectron2(tensors)
    if looks_like_timm(tensors):
        return from_timm(tensors), WeightsInfo()
    if "layer3.0.conv1.weight" in tensors and "layer4.0.conv1.weight" not in tensors:
        return {_cifar_name(name): tensor for name, tensor in tensors.items()}, WeightsInfo()
    return dict(tensors), WeightsInfo()


def _cifar_name(name: str) -> str:
    return f"fc.{name.removeprefix(CIFAR_HEAD)}" if name.startswith(CIFAR_HEAD) else name

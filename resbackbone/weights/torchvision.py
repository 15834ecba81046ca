"""torchvision's ImageNet weights: found by its own enum, downloaded once into torch.hub's folder, checked by their hash."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlparse

from resbackbone.errors import InputError, nearest

# Trained by the paper's recipe. The newer sets score higher on ImageNet, but published detectors start from this one.
WEIGHTS = "IMAGENET1K_V1"


def download_torchvision(name: str) -> Path:
    """The file of torchvision's weights for `name`, downloaded if it isn't there. InputError when offline or unknown."""
    import torch.hub

    url = _url(name)
    file_name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if path.is_file():
        return path
    hash_prefix = torch.hub.HASH_REGEX.search(file_name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix.group(1) if hash_prefix else None, progress=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash a RuntimeError
        raise InputError(
            f"{name}: torchvision's weights could not be downloaded from {url} ({error}). Without a network, put that file at {path}, "
            "or give weights=FILE"
        ) from error
    return path


def _url(name: str) -> str:
    try:
        from torchvision.models import get_model_weights, list_models
    except ImportError as error:
        raise InputError("weights='torchvision' needs torchvision to find them; pip install torchvision, or give weights=FILE") from error
    if name not in list_models():
        raise InputError(f"torchvision has no weights for {name!r};{nearest(name, list_models())} give weights=FILE or null")
    return get_model_weights(name)[WEIGHTS].url

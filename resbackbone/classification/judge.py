"""What tools/eval_cls.py does: weights judged in one mode after the other; before that, where asked for, appendix A's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from resbackbone.classification.evaluate import evaluate_files, load_split
from resbackbone.classification.networks import classifier_metadata, load_trained, normalizer_of
from resbackbone.classification.statistics import recompute_statistics, training_images
from resbackbone.classification.train import open_training_data
from resbackbone.errors import InputError
from resbackbone.runtime import distributed
from resbackbone.runtime.checkpoint import save_weights
from resbackbone.runtime.precision import Precision


def judge(
    weights: Sequence[Path], config_file: Path | None, overrides: Sequence[str], modes: Sequence[str | None], recomputed: Path | None = None
) -> dict[str, dict[str, float]]:
    """Figures by mode; None is the config's own mode, under the name eval. recomputed: see `recompute_norms`; that file is then judged.

    Raises InputError as `evaluate_files` and `recompute_norms` do.
    """
    try:
        if recomputed is not None:
            recompute_norms(weights, recomputed, config_file, overrides)
            weights = [recomputed]
        chosen = {mode or "eval": [] if mode is None else [f"eval.mode={mode}"] for mode in modes}
        return {name: evaluate_files(weights, config_file, [*overrides, *extra]) for name, extra in chosen.items()}
    finally:
        distributed.shutdown()


def recompute_norms(weights: Sequence[Path], target: Path, config_file: Path | None, overrides: Sequence[str]) -> int:
    """Write the one file of `weights` to `target` with batch norm's statistics over `train.bn_images` images of the training split.

    Images are augmented as in training. Returns how many it were. Joins the processes of a torchrun, as `evaluate_files` does. Raises
    InputError for files that can't be read or written, and where `train.bn_images` takes no images.
    """
    if len(weights) > 1:
        raise InputError(f"--recompute-bn writes one file, and --weights names {len(weights)}; give one")
    if target.suffix != ".safetensors":
        raise InputError(f"--recompute-bn {target}: our own weights are .safetensors files; give the file that ending")
    trained = load_trained(weights[0], config_file, overrides)
    config, settings = trained.config, trained.config.train
    if settings.bn_images == 0:
        raise InputError("train.bn_images=0 leaves the statistics as they are; set it to -1 for all training images, or to how many")
    process = distributed.setup(None if settings.device == "auto" else settings.device)
    loader, sampler = open_training_data(config, load_split(config, config.data.train), process)
    net = trained.net.to(process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalize = normalizer_of(net).to(process.device)
    with Precision(settings.precision, process.device).autocast():
        images = recompute_statistics(net, training_images(loader, sampler, settings, normalize, process.device))
    if process.is_main:
        save_weights(target, net.state_dict(), classifier_metadata(config, net, trained.classes))
    distributed.barrier()  # everybody reads it next
    return images

"""Backbones of other libraries: `timm:NAME` and `torchvision:NAME`, with the maps, freezing and norms of our own.

Maps are named by stride: 2 conv1, 4 conv2_x, 8 conv3_x, 16 conv4_x, 32 conv5_x; of several maps with one stride the deepest counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.backbone import Backbone, FeatureInfo, Preprocessing, imagenet_preprocessing
from resbackbone.errors import InputError, nearest
from resbackbone.layers import EvalBatchNorm2d, FrozenBatchNorm2d, norm_factory
from resbackbone.weights import load_weights

PROBE_SIZE = 224  # what every classifier takes
STRIDES = (1, 2, 4, 8, 16, 32, 64)


class ForeignBackbone(Backbone):
    """Another library's feature extractor behind our contract.

    Args:
        net: images -> the maps, as a list or dict in the order of `feature_info`.
        feature_info: what it returns.
        preprocessing: what its weights expect.
        probe_size: an image size (height, width) it accepts, for finding out which module serves which map.
    """

    def __init__(
        self, net: nn.Module, feature_info: dict[str, FeatureInfo], *, preprocessing: Preprocessing, probe_size: tuple[int, int]
    ) -> None:
        super().__init__(feature_info, preprocessing=preprocessing)
        self.net = net
        self.probe_size = probe_size
        self._returned = tuple(feature_info)  # by net, in order
        self._stage_modules: dict[str, list[str]] | None = None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.net(images)
        values = maps.values() if isinstance(maps, dict) else maps
        return {name: features for name, features in zip(self._returned, values, strict=True) if name in self._out_features}

    def stage_modules(self, name: str) -> tuple[nn.Module, ...]:
        if self._stage_modules is None:
            self._stage_modules = self._find_stage_modules()
        return tuple(self.net.get_submodule(path) for path in self._stage_modules[name])

    def _find_stage_modules(self) -> dict[str, list[str]]:
        """Ask autograd: a stage's parameters are those its map depends on and no lower map does."""
        wanted = {parameter: parameter.requires_grad for parameter in self.net.parameters()}
        modes = {module: module.training for module in self.net.modules()}
        self.net.eval().requires_grad_(True)
        try:
            with torch.enable_grad():
                device = next(iter(wanted)).device
                maps = self.net(torch.zeros(1, len(self.preprocessing.mean), *self.probe_size, device=device))
        finally:
            for parameter, learns in wanted.items():
                parameter.requires_grad_(learns)
            for module, mode in modes.items():
                module.training = mode
        found: dict[str, list[str]] = {}
        seen: set[nn.Parameter] = set()
        for name, features in zip(self._returned, maps.values() if isinstance(maps, dict) else maps, strict=True):
            owned = _parameters_behind(features) - seen
            seen |= owned
            found[name] = [path for path, module in self.net.named_modules() if owned & set(module.parameters(recurse=False))]
        return found

    def trim(self) -> None:
        """Stop computing what lies above the last of `out_features`."""
        names = list(self.feature_info)
        unused = names[names.index(self._out_features[-1]) + 1 :]
        for name in unused:
            for module in self.stage_modules(name):
                module.requires_grad_(False)
        self._drop_outputs(set(self._returned) - set(self._out_features))
        for name in unused:
            del self.feature_info[name]
        self.frozen_stages = min(self.frozen_stages, len(self.feature_info))

    def _drop_outputs(self, names: set[str]) -> None:
        """Take outputs from a graph; the modules only they need go. Other extractors go on computing them."""
        net: Any = self.net
        if isinstance(self.net, torch.fx.GraphModule) and names:
            for graph in (net.train_graph, net.eval_graph):
                output = next(node for node in graph.nodes if node.op == "output")
                output.args = ({name: node for name, node in output.args[0].items() if name not in names},)
                graph.eliminate_dead_code()
            net.graph = net.train_graph if net.training else net.eval_graph
            net.delete_all_unused_submodules()
            self._returned = tuple(name for name in self._returned if name not in names)
        elif isinstance(net, nn.ModuleDict) and hasattr(net, "return_layers"):
            self._shorten(net)

    def _shorten(self, net: Any) -> None:
        """Of timm's chain of children with `return_layers` among them, remove those after the last map asked for."""
        layers, children = list(net.return_layers), list(net.keys())
        last = layers[self._returned.index(self._out_features[-1])]
        for child in children[children.index(last) + 1 :]:
            del net[child]
        for layer in layers[layers.index(last) + 1 :]:
            del net.return_layers[layer]
        self._returned = self._returned[: len(net.return_layers)]


def create_foreign(
    name: str,
    *,
    weights: str | Path | None,
    variant: str,
    norm: str,
    norm_eps: float | None,
    output_stride: int,
    dilation_rule: str,
    in_channels: int,
    checkpointing: bool,
) -> ForeignBackbone:
    """Build `timm:NAME` or `torchvision:NAME`; InputError says what to install, or which option it doesn't have."""
    for option, value, default in (("variant", variant, "v1.5"), ("dilation_rule", dilation_rule, "torchvision")):
        if value != default:
            raise InputError(f"{name} has no option {option}; leave it at {default!r}, not {value!r}")
    library, _, model = name.partition(":")
    if library == "timm":
        net = _create_timm(model, weights=weights, output_stride=output_stride, in_channels=in_channels, checkpointing=checkpointing)
        replace_norms(net.net, norm, eps=norm_eps)
    else:
        if in_channels != 3 or checkpointing:
            raise InputError(f"{name} takes three channels and no checkpointing; timm:{model} may have both")
        net = _create_torchvision(model, weights=weights, output_stride=output_stride, norm=norm, norm_eps=norm_eps)
    net.architecture = name
    net.weights = weights
    return net


def replace_norms(net: nn.Module, kind: str, *, eps: float | None = None) -> None:
    """Turn every batch norm inside `net` into `kind`, keeping its weights and statistics where the new one has them."""
    norm_factory(kind)  # refuses an unknown kind
    for path, old in [(path, module) for path, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]:
        if eps is not None:
            old.eps = eps
        if kind != "batch":
            parent, _, child = path.rpartition(".")
            setattr(net.get_submodule(parent), child, _with_what_followed(_converted(old, kind), old))


def _converted(old: nn.BatchNorm2d, kind: str) -> nn.Module:
    new = norm_factory(kind, eps=old.eps)(old.num_features)
    if isinstance(new, FrozenBatchNorm2d | EvalBatchNorm2d | nn.SyncBatchNorm):
        new.load_state_dict(old.state_dict(), strict=False)
    return new


def _with_what_followed(new: nn.Module, old: nn.BatchNorm2d) -> nn.Module:
    """timm's BatchNormAct2d holds a dropout and an activation as well."""
    followed = [part for part in (getattr(old, "drop", None), getattr(old, "act", None)) if isinstance(part, nn.Module)]
    return nn.Sequential(new, *followed) if followed else new


def _create_timm(model: str, *, weights: str | Path | None, output_stride: int, in_channels: int, checkpointing: bool) -> ForeignBackbone:
    try:
        import timm
    except ImportError as error:
        raise InputError(f"timm:{model} needs timm; pip install 'resbackbone[timm]'") from error
    if not timm.is_model(model):
        raise InputError(f"timm has no model {model!r};{nearest(model, timm.list_models())} see timm.list_models()")
    options: dict[str, Any] = {"in_chans": in_channels}
    report = "timm's own weights" if weights == "timm" else ""
    if output_stride != 32:
        options["output_stride"] = output_stride
    if isinstance(weights, Path) or weights not in (None, "timm", "torchvision"):
        tensors, report = _read_timm(model, weights, in_channels)
        options["pretrained_cfg_overlay"] = {"state_dict": tensors, "custom_load": False}
    elif weights == "torchvision":
        raise InputError(f"timm:{model} takes weights timm, a file, or null; or take torchvision:{model}")
    net = _call_timm(model, pretrained=weights is not None, **options)
    if checkpointing:
        if not hasattr(net, "set_grad_checkpointing"):
            raise InputError(f"timm:{model} has no gradient checkpointing; leave checkpointing off")
        net.set_grad_checkpointing(True)
    config = net.pretrained_cfg
    mean, std = tuple(config.get("mean") or ()), tuple(config.get("std") or ())
    preprocessing = Preprocessing(mean, std) if len(mean) == in_channels else imagenet_preprocessing(in_channels)
    infos = [FeatureInfo(*pair) for pair in zip(net.feature_info.channels(), net.feature_info.reduction(), strict=True)]
    size = tuple((config.get("input_size") or (in_channels, PROBE_SIZE, PROBE_SIZE))[1:])
    backbone = ForeignBackbone(
        _DeepestOfEachStride(net, infos) if _repeats(infos) and output_stride == 32 else net,
        _named_in_order(infos) if output_stride != 32 else _named_by_stride(infos),
        preprocessing=preprocessing,
        probe_size=size,
    )
    backbone.load_report = report
    return backbone


def _call_timm(model: str, **options: Any) -> Any:
    import timm

    try:
        return timm.create_model(model, features_only=True, **options)
    except Exception as error:  # timm's, the hub's and the network's errors have no common ancestor
        weights = " with its weights; offline, give weights=FILE" if options.get("pretrained") else ""
        raise InputError(f"timm:{model} could not be created as a feature extractor{weights} ({type(error).__name__}: {error})") from error


def _read_timm(model: str, weights: str | Path, in_channels: int) -> tuple[dict[str, Tensor], str]:
    """The state dict of the file, proven to fit the whole network but for its classifier, and the report."""
    import timm

    full: Any = timm.create_model(model, num_classes=0, in_chans=in_channels)
    full.architecture = f"timm:{model}"
    classifiers = full.pretrained_cfg.get("classifier") or ()
    names = (classifiers,) if isinstance(classifiers, str) else classifiers
    report = load_weights(full, weights, drop_prefixes=tuple(f"{name}." for name in names))
    return full.state_dict(), str(report)


class _DeepestOfEachStride(nn.Module):
    """Of a network that returns several maps of one stride, the deepest of each."""

    def __init__(self, net: nn.Module, infos: Sequence[FeatureInfo]) -> None:
        super().__init__()
        self.net = net
        self.kept = sorted({info.stride: number for number, info in enumerate(infos)}.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.net(images)
        return [maps[number] for number in self.kept]


def _repeats(infos: Sequence[FeatureInfo]) -> bool:
    return len({info.stride for info in infos}) < len(infos)


def _named_by_stride(infos: Sequence[FeatureInfo]) -> dict[str, FeatureInfo]:
    return {_stride_name(stride): info for stride, info in {info.stride: info for info in infos}.items()}


def _named_in_order(infos: Sequence[FeatureInfo]) -> dict[str, FeatureInfo]:
    """With dilation several stages share a stride: they keep the names they have without."""
    first = STRIDES.index(infos[0].stride)
    return {_stride_name(STRIDES[first + number]): info for number, info in enumerate(infos)}


def _stride_name(stride: int) -> str:
    number = stride.bit_length() - 1
    return f"conv{number}" if number < 2 else f"conv{number}_x"


def _create_torchvision(
    model: str, *, weights: str | Path | None, output_stride: int, norm: str, norm_eps: float | None
) -> ForeignBackbone:
    try:
        from torchvision import models
        from torchvision.models.feature_extraction import create_feature_extractor
    except ImportError as error:
        raise InputError(f"torchvision:{model} needs torchvision; pip install torchvision") from error
    known = models.list_models(module=models)
    if model not in known:
        raise InputError(f"torchvision has no classifier {model!r};{nearest(model, known)} see torchvision.models.list_models()")
    full: Any = models.get_model(model, weights=None)
    nodes = {name: path for name, (path, _) in _measured(full).items()}
    if output_stride != 32:
        full = _dilated(model, output_stride)
    report = ""
    if weights is not None:
        full.architecture = model
        report = str(load_weights(full, weights))
    replace_norms(full, norm, eps=norm_eps)
    info = _info_at(full, nodes)
    leaves = {"leaf_modules": [FrozenBatchNorm2d, EvalBatchNorm2d]}
    extractor = create_feature_extractor(full, {path: name for name, path in nodes.items()}, tracer_kwargs=leaves)
    net = ForeignBackbone(extractor, info, preprocessing=imagenet_preprocessing(), probe_size=(PROBE_SIZE, PROBE_SIZE))
    net.load_report = report
    return net


def _dilated(model: str, output_stride: int) -> nn.Module:
    from torchvision import models

    if output_stride not in (8, 16):
        raise InputError(f"output_stride={output_stride} is not possible; choose 8, 16 or 32")
    try:
        return models.get_model(model, weights=None, replace_stride_with_dilation=[False, output_stride == 8, True])
    except (TypeError, NotImplementedError) as error:
        raise InputError(f"torchvision:{model} has no dilated form for output_stride={output_stride}; take a ResNet-50 or ours") from error


def _outputs(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(path, output) of every module that returns one tensor, in the order they finish on a probe image."""
    finished: list[tuple[str, Tensor]] = []

    def note(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                finished.append((path, output))

        return hook

    handles = [module.register_forward_hook(note(path)) for path, module in net.named_modules() if path]
    was_training = net.training
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
    net.train(was_training)
    for handle in handles:
        handle.remove()
    yield from finished


def _measured(net: nn.Module) -> dict[str, tuple[str, FeatureInfo]]:
    """Of each stride, the path of the last module with a map of that stride."""
    last: dict[int, tuple[str, FeatureInfo]] = {}
    for path, output in _outputs(net):
        square = output.ndim == 4 and output.shape[2] == output.shape[3] and PROBE_SIZE % output.shape[2] == 0
        if square and (stride := PROBE_SIZE // output.shape[2]) in STRIDES[1:]:
            last[stride] = (path, FeatureInfo(output.shape[1], stride))
    if not last:
        raise InputError("this torchvision network has no maps [N, C, H, W]; timm may have it as a feature extractor")
    return {_stride_name(stride): last[stride] for stride in sorted(last)}


def _info_at(net: nn.Module, nodes: dict[str, str]) -> dict[str, FeatureInfo]:
    outputs = dict(_outputs(net))
    return {name: FeatureInfo(outputs[path].shape[1], PROBE_SIZE // outputs[path].shape[2]) for name, path in nodes.items()}


def _parameters_behind(features: Tensor) -> set[nn.Parameter]:
    """The leaves of the autograd graph that `features` was computed from."""
    found, waiting, seen = set(), [features.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), nn.Parameter):
            found.add(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found

"""The paper's tables as data (He et al. 2015, Deep Residual Learning), and which of our commands gives the figure beside each of theirs.

A job is one command of tools/; it is done when RESULTS/NAME/eval/metrics.json is there. {data} and {results} stand for folders.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command's tool and words; data: the keys of DATA it reads; after: jobs it needs done first."""

    tool: str
    words: tuple[str, ...]
    data: tuple[str, ...]
    after: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The paper's figure in per cent. job and metric (a path of keys, with /): where ours stands; error: as 100 - ours.

    Without a job: why there is none.
    """

    paper: float | None
    job: str | None = None
    metric: str = ""
    error: bool = False
    why_not: str = ""


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """One table: columns, rows of cells by label, and what to know when the two are compared."""

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[Cell, ...]]
    note: str


@dataclass(frozen=True, kw_only=True)
class Data:
    """Files below the data folder that show a data set is there, and how to get it."""

    files: tuple[str, ...]
    how: str


DATA = {
    "coco": Data(
        files=("coco/annotations/instances_train2014.json", "coco/annotations/instances_val2014.json", "coco/train2014", "coco/val2014"),
        how="COCO 2014, as the paper had it: train2014.zip, val2014.zip and annotations_trainval2014.zip (20 GB) from cocodataset.org, "
        "unpacked side by side in {data}/coco; see docs/data.md",
    ),
    "voc": Data(
        files=(
            "voc/VOCdevkit/VOC2007/ImageSets/Main/trainval.txt",
            "voc/VOCdevkit/VOC2007/ImageSets/Main/test.txt",
            "voc/VOCdevkit/VOC2012/ImageSets/Main/trainval.txt",
        ),
        how="PASCAL VOC 2007 (trainval and test) and 2012 (trainval), 3 GB, from host.robots.ox.ac.uk/pascal/VOC, unpacked in {data}/voc; "
        "see docs/data.md",
    ),
    "imagenet": Data(
        files=("imagenet/ILSVRC2012_img_train", "imagenet/ILSVRC2012_img_val"),
        how="ILSVRC 2012 (138 GB + 6 GB and the development kit), after registering at image-net.org, unpacked in {data}/imagenet",
    ),
    "cifar10": Data(
        files=("cifar-10-batches-bin/data_batch_1.bin", "cifar-10-batches-bin/test_batch.bin"),
        how="CIFAR-10's binary version (162 MB) from cs.toronto.edu/~kriz/cifar.html, unpacked as {data}/cifar-10-batches-bin",
    ),
}

_COCO = ("data.root={data}/coco", "data.train=train2014", "data.val=val2014", "data.min_size=600", "data.max_size=1000")
_SCALES = "model.test.scales=[200,400,600,800,1000]"
_SERVER = "the labels of that test set aren't public; its server scores uploads"
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def _train_det(config: str, *words: str, data: str) -> Job:
    return Job(tool="train_det", words=("--config", f"configs/{config}.yaml", *words), data=(data,))


def _fine_tune(config: str, start: str, *words: str, data: str) -> Job:
    given = (f"model.weights={{results}}/{start}/model_final.safetensors", *words)
    return Job(tool="train_det", words=("--config", f"configs/{config}.yaml", *given), data=(data,), after=(start,))


def _eval_det(tool: str, weights: str, *words: str, data: str) -> Job:
    given = ("--weights", "{results}/" + weights + "/model_final.safetensors", f"data.root={{data}}/{data}", *words)  # it may have moved
    return Job(tool=tool, words=given, data=(data,), after=(weights,))


def _train_cls(config: str, name: str, root: str, *words: str, data: str) -> Job:
    given = (f"model.name={name}", f"data.root={{data}}/{root}", *words)
    return Job(tool="train_cls", words=("--config", f"configs/{config}.yaml", *given), data=(data,))


JOBS: dict[str, Job] = {
    "voc_vgg16": _train_det("frcnn_vgg16_voc", "data.root={data}/voc", data="voc"),
    "voc_resnet101": _train_det("frcnn_r101_voc", "data.root={data}/voc", data="voc"),
    "coco_vgg16": _train_det("frcnn_vgg16_coco", *_COCO, data="coco"),
    "coco_resnet101": _train_det("frcnn_r101_coco", *_COCO, data="coco"),
    "coco_resnet101_refine": _eval_det("eval_coco", "coco_resnet101", "model.test.refine=true", data="coco"),
    "coco_resnet101_context_trained": _train_det("frcnn_r101_coco", *_COCO, "model.test.context=true", data="coco"),
    "coco_resnet101_context": _eval_det("eval_coco", "coco_resnet101_context_trained", "model.test.refine=true", data="coco"),
    "coco_resnet101_scales": _eval_det("eval_coco", "coco_resnet101_context_trained", "model.test.refine=true", _SCALES, data="coco"),
    "voc_resnet101_from_coco": _fine_tune(
        "frcnn_r101_voc", "coco_resnet101_context_trained", "data.root={data}/voc", "model.test.context=true", data="voc"
    ),
    "voc_resnet101_from_coco_scales": _eval_det("eval_voc", "voc_resnet101_from_coco", "model.test.refine=true", _SCALES, data="voc"),
}

# The networks of tables 3 and 4: what the paper calls them, ours, and options; all by configs/imagenet/resnet50.yaml.
_NETWORKS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "plain-34": ("imagenet_plain34", "plain34", ()),
    "ResNet-34 A": ("imagenet_resnet34_a", "resnet34", ("model.options={shortcut: A}",)),
    "ResNet-34 B": ("imagenet_resnet34_b", "resnet34", ("model.options={shortcut: B}",)),
    "ResNet-34 C": ("imagenet_resnet34_c", "resnet34", ("model.options={shortcut: C}",)),
    "ResNet-50": ("imagenet_resnet50", "resnet50", ()),
    "ResNet-101": ("imagenet_resnet101", "resnet101", ()),
    "ResNet-152": ("imagenet_resnet152", "resnet152", ()),
}
for _job, _name, _options in _NETWORKS.values():
    JOBS[_job] = _train_cls("imagenet/resnet50", _name, "imagenet", *_options, data="imagenet")
    for _mode in ("10crop", "multiscale"):
        JOBS[f"{_job}_{_mode}"] = Job(
            tool="eval_cls",
            words=("--weights", "{results}/" + _job + "/model_final.safetensors", "--mode", _mode, "data.root={data}/imagenet"),
            data=("imagenet",),
            after=(_job,),
        )
for _depth in (20, 32, 44, 56, 110, 1202):
    _config = "cifar/resnet20" if _depth < 110 else "cifar/resnet110"
    JOBS[f"cifar_resnet{_depth}"] = _train_cls(_config, f"resnet{_depth}_cifar", "cifar-10-batches-bin", data="cifar10")


def _coco(job: str, ap50: float, ap: float) -> tuple[Cell, Cell]:
    return Cell(paper=ap50, job=job, metric="AP50"), Cell(paper=ap, job=job, metric="AP")


def _quoted(*figures: float | None, why: str) -> tuple[Cell, ...]:
    return tuple(Cell(paper=figure, why_not=why) for figure in figures)


def _classifier(label: str, mode: str, top1: float, top5: float) -> tuple[Cell, Cell]:
    job = f"{_NETWORKS[label][0]}_{mode}"
    return Cell(paper=top1, job=job, metric=f"{mode}/top1", error=True), Cell(paper=top5, job=job, metric=f"{mode}/top5", error=True)


def _ladder(job: str, val: tuple[float, float], test_dev: tuple[float | None, float | None]) -> tuple[Cell, ...]:
    return (*_coco(job, *val), *_quoted(*test_dev, why=_SERVER))


# Table 10, class by class, by the job that gives ours.
_AP_OF_CLASSES = {
    "voc_vgg16": (76.5, 79.0, 70.9, 65.5, 52.1, 83.1, 84.7, 86.4, 52.0, 81.9, 65.7, 84.8, 84.6, 77.5, 76.7, 38.8, 73.6, 73.9, 83.0, 72.6),
    "voc_resnet101": (
        79.8,
        80.7,
        76.2,
        68.3,
        55.9,
        85.1,
        85.3,
        89.8,
        56.7,
        87.8,
        69.4,
        88.3,
        88.9,
        80.9,
        78.4,
        41.7,
        78.6,
        79.8,
        85.3,
        72.0,
    ),
    "voc_resnet101_from_coco_scales": (
        *(90.0, 89.6, 87.8, 80.8, 76.1, 89.9, 89.9, 89.6, 75.5, 90.0),
        *(80.7, 89.6, 90.3, 89.1, 88.7, 65.4, 88.1, 85.6, 89.0, 86.8),
    ),
}

TABLES: dict[str, PaperTable] = {
    "table3": PaperTable(
        title="Table 3: error on ImageNet validation, 10-crop testing",
        columns=("top-1", "top-5"),
        rows={
            "VGG-16": _quoted(28.07, 9.33, why="the paper tested its authors' weights"),
            "PReLU-net": _quoted(24.27, 7.38, why="another paper's network"),
            "plain-34": _classifier("plain-34", "10crop", 28.54, 10.02),
            "ResNet-34 A": _classifier("ResNet-34 A", "10crop", 25.03, 7.76),
            "ResNet-34 B": _classifier("ResNet-34 B", "10crop", 24.52, 7.46),
            "ResNet-34 C": _classifier("ResNet-34 C", "10crop", 24.19, 7.40),
            "ResNet-50": _classifier("ResNet-50", "10crop", 22.85, 6.71),
            "ResNet-101": _classifier("ResNet-101", "10crop", 21.75, 6.05),
            "ResNet-152": _classifier("ResNet-152", "10crop", 21.43, 5.71),
        },
        note="one run each, by configs/imagenet/resnet50.yaml: the paper's recipe",
    ),
    "table4": PaperTable(
        title="Table 4: error of single models on ImageNet validation, fully convolutional at sides {224, 256, 384, 480, 640}",
        columns=("top-1", "top-5"),
        rows={
            "ResNet-34 B": _classifier("ResNet-34 B", "multiscale", 21.84, 5.71),
            "ResNet-34 C": _classifier("ResNet-34 C", "multiscale", 21.53, 5.60),
            "ResNet-50": _classifier("ResNet-50", "multiscale", 20.74, 5.25),
            "ResNet-101": _classifier("ResNet-101", "multiscale", 19.87, 4.60),
            "ResNet-152": _classifier("ResNet-152", "multiscale", 19.38, 4.49),
        },
        note="the same weights as table 3's",
    ),
    "table6": PaperTable(
        title="Table 6: error on the CIFAR-10 test set",
        columns=("error",),
        rows={
            f"ResNet-{depth}": (Cell(paper=error, job=f"cifar_resnet{depth}", metric="top1", error=True),)
            for depth, error in ((20, 8.75), (32, 7.51), (44, 7.17), (56, 6.97), (110, 6.43), (1202, 7.93))
        },
        note="the paper's 110 layers are the best of five runs (mean 6.61, deviation 0.16); ours is one run",
    ),
    "table7": PaperTable(
        title="Table 7: mAP on PASCAL VOC, baseline Faster R-CNN",
        columns=("07+12 → 07 test", "07++12 → 12 test"),
        rows={
            "VGG-16": (Cell(paper=73.2, job="voc_vgg16", metric="mAP_11_point"), *_quoted(70.4, why=_SERVER)),
            "ResNet-101": (Cell(paper=76.4, job="voc_resnet101", metric="mAP_11_point"), *_quoted(73.8, why=_SERVER)),
        },
        note="VOC 2007's own metric, 11 points; ours: RPN and detector trained jointly, regions aligned",
    ),
    "table8": PaperTable(
        title="Table 8: mAP on COCO, train → val (2014), baseline Faster R-CNN",
        columns=("mAP@.5", "mAP@[.5,.95]"),
        rows={"VGG-16": _coco("coco_vgg16", 41.5, 21.2), "ResNet-101": _coco("coco_resnet101", 48.4, 27.2)},
        note="ours: RPN and detector trained jointly by configs/frcnn_*_coco.yaml at 600 px, regions aligned",
    ),
    "table9": PaperTable(
        title="Table 9: the way up on COCO with ResNet-101, train → val and trainval → test-dev",
        columns=("val @.5", "val @[.5,.95]", "test-dev @.5", "test-dev @[.5,.95]"),
        rows={
            "baseline (VGG-16)": _ladder("coco_vgg16", (41.5, 21.2), (None, None)),
            "baseline (ResNet-101)": _ladder("coco_resnet101", (48.4, 27.2), (None, None)),
            "+ box refinement": _ladder("coco_resnet101_refine", (49.9, 29.9), (None, None)),
            "+ context": _ladder("coco_resnet101_context", (51.1, 30.0), (53.3, 32.2)),
            "+ multi-scale testing": _ladder("coco_resnet101_scales", (53.8, 32.5), (55.7, 34.9)),
            "ensemble of 3": (*_quoted(None, None, why="the paper has none"), *_quoted(59.0, 37.4, why=_SERVER)),
        },
        note="each row adds to the one above it; an ensemble of your own: tools/eval_coco.py --weights A B C",
    ),
    "table10": PaperTable(
        title="Table 10: mAP on the VOC 2007 test set",
        columns=("VGG-16", "ResNet-101", "ResNet-101+++"),
        rows={
            "mAP": tuple(
                Cell(paper=mean, job=job, metric="mAP_11_point") for job, mean in zip(_AP_OF_CLASSES, (73.2, 76.4, 85.6), strict=True)
            ),
            **{
                name: tuple(Cell(paper=aps[number], job=job, metric=f"VOC_11_point/{name}") for job, aps in _AP_OF_CLASSES.items())
                for number, name in enumerate(VOC_CLASSES)
            },
        },
        note="trained on 07+12, with VOC 2007's own metric, 11 points; +++: refinement, context and multi-scale testing, from a COCO "
        "detector: ours saw COCO's train part alone",
    ),
}

"""What the backbone alone changes: several backbones, one data set, one recipe, one budget, several seeds (He et al. 2015, tables 7 and 8).

Every run is an ordinary training in OUTPUT/runs/NAME/seed_S; what is finished there is taken as it is, what was begun goes on. Then:
a mean and a spread over seeds for each backbone, the gain over a baseline, and for each pair an interval from images drawn anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from detection.alternating import train_alternating
from detection.build import build_detector
from detection.config import DetectionConfig, load_detection_config, load_split
from detection.data.source import Source
from detection.evaluation.bootstrap import Interval, Verdicts, coco_verdicts, draws, interval_of, mean_aps, voc_verdicts
from detection.evaluation.evaluate import primary_metric, voc_truth
from detection.evaluation.results import coco_image_ids
from detection.fine_tune import detector_from
from detection.train import train
from resbackbone.errors import InputError, nearest
from resbackbone.runtime.atomic import write_atomically
from resbackbone.runtime.config import changed_settings

DEFAULT_BASELINE = "vgg16"  # tables 7 and 8
RESAMPLES, LEVEL = 1000, 0.95
FREE = ("model.backbone.norm_eps", "train.device", "data.workers", "eval.report", "eval.samples")  # may differ: no figure hangs on them


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A backbone, the weights it starts from (None: those of the config), and the settings that it alone needs."""

    name: str
    weights: str | None = None
    own: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What its folder and its row are called: without what no folder name may hold."""
        return self.name.replace(":", "_").replace("/", "_")

    def overrides(self) -> list[str]:
        """The settings that make a recipe this one's."""
        weights = [] if self.weights is None else [f"model.backbone.weights={self.weights}"]
        return [f"model.backbone.name={self.name}", *weights, *self.own]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished training: what it started from, its figures, and its verdicts on each image."""

    contender: Contender
    weights: str | None
    seed: int
    folder: Path
    metrics: dict[str, float]
    verdicts: Verdicts


def parse_contenders(given: Sequence[str], own: Sequence[Sequence[str]] = ()) -> list[Contender]:
    """From NAME or NAME=WEIGHTS each. own: pairs of NAME and a setting key.path=value for it alone, as a pyramid of fewer levels needs.

    Raises InputError for a name given twice, and a setting for one that takes no part.
    """
    found = []
    for text in given:
        name, equals, weights = text.partition("=")
        settings = tuple(setting for whose, setting in own if whose == name)
        found.append(Contender(name=name, weights=weights if equals else None, own=settings))
    names = [one.name for one in found]
    for whose, setting in own:
        if whose not in names:
            raise InputError(f"--own {whose} {setting}: it takes no part;{nearest(whose, names)} choose from {', '.join(names)}")
    labels = [one.label for one in found]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise InputError(f"--backbones names {', '.join(twice)} more than once; runs are kept by name, so give each once")
    return found


def compare(
    config: Path,
    contenders: Sequence[Contender],
    output: Path,
    *,
    seeds: Sequence[int] = (0, 1),
    overrides: Sequence[str] = (),
    baseline: str | None = None,
    resamples: int = RESAMPLES,
    log: Callable[[str], None] = print,
) -> dict[str, Path]:
    """Train what is missing, judge all, write compare.json, compare.md and compare.png into `output`; returns their paths by ending.

    baseline: a backbone's name; None: vgg16 if it takes part, else the first. Raises InputError as training does, for a baseline that
    doesn't take part, a seed given twice, and a folder whose run had other settings: what can be known is said before any training.
    """
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise InputError(f"--seeds names {', '.join(map(str, twice))} more than once, which is one run, not two; give each seed once")
    labels = [one.label for one in contenders]
    base = _baseline(baseline, labels)
    planned = [
        (one, seed, load_detection_config(config, [*overrides, *one.overrides(), f"train.seed={seed}"]))
        for one in contenders
        for seed in seeds
    ]
    folders = [output / "runs" / one.label / f"seed_{seed}" for one, seed, _ in planned]
    source = load_split(planned[0][2], "val")
    _check_all(planned, folders, source.annotations.classes)
    runs = []
    for (one, seed, settings), folder in zip(planned, folders, strict=True):
        if not is_finished(folder, settings):
            log(f"training {one.name}, seed {seed} in {folder}")
            (train_alternating if settings.train.protocol == "alternating" else train)(settings, folder, resume="auto")
        runs.append(_read_run(one, settings, folder, source))
    recipe = " ".join([str(config), *overrides])
    return write_comparison(output, runs, labels, metric=primary_metric(source), baseline=base, recipe=recipe, resamples=resamples)


def _check_all(planned: Sequence[tuple[Contender, int, DetectionConfig]], folders: Sequence[Path], classes: Sequence[str]) -> None:
    """Raises InputError for what the last contender would stumble over days from now: its folder, its name, anchors, norm or weights."""
    checked: set[str] = set()
    for (one, _, settings), folder in zip(planned, folders, strict=True):
        if not is_finished(folder, settings) and one.label not in checked:
            checked.add(one.label)
            if settings.model.weights is None:
                build_detector(settings, len(classes))
            else:
                detector_from(settings, classes)


def is_finished(folder: Path, config: DetectionConfig) -> bool:
    """Whether `folder` holds the finished run of `config`. Raises InputError where it holds a run of other settings."""
    if not (folder / "config.yaml").is_file():
        return False
    changes = changed_settings(load_detection_config(folder / "config.yaml"), config)
    changes = [change for change in changes if change.partition(":")[0] not in FREE]
    if changes:
        raise InputError(
            f"{folder} holds a run with other settings: {'; '.join(changes[:4])}. Give another --output, or remove that folder"
        )
    return all((folder / name).is_file() for name in ("model_final.safetensors", "eval/metrics.json", "eval/detections.json"))


def paired_gain(
    first: Sequence[Verdicts], second: Sequence[Verdicts], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Interval, float]:
    """The mean of `second` minus the mean of `first`, one entry a seed of training, all judged on the same images drawn with replacement.

    The interval holds 95 % of the draws: how far other test images would move the gain; then the share of draws above 0. What other seeds
    would do, their spread tells.
    """
    return interval_of(_drawn(second, resamples, seed) - _drawn(first, resamples, seed), LEVEL)


def write_comparison(
    output: Path, runs: Sequence[Run], labels: Sequence[str], *, metric: str, baseline: str, recipe: str, resamples: int = RESAMPLES
) -> dict[str, Path]:
    """compare.json, compare.md and compare.png of finished runs, in the order of `labels`."""
    of = {label: [run for run in runs if run.contender.label == label] for label in labels}
    rows = {label: _row(group, metric) for label, group in of.items()}
    for row in rows.values():
        row["gain"] = row["mean"] - rows[baseline]["mean"]
    content: dict[str, Any] = {"recipe": recipe, "metric": metric, "baseline": baseline, "backbones": rows}
    content |= {"pairs": _pairs(of, resamples), "resamples": resamples, "level": LEVEL}
    paths = {ending: output / f"compare.{ending}" for ending in ("json", "md", "png")}
    write_atomically(paths["json"], (json.dumps(content, indent=2) + "\n").encode())
    write_atomically(paths["md"], format_comparison(content).encode())
    _plot(paths["png"], rows, metric)
    return paths


def format_comparison(content: dict[str, Any]) -> str:
    """The two tables of compare.json as Markdown; figures in per cent, as the paper has them."""
    metric, baseline = content["metric"], content["baseline"]
    lines = [f"{content['recipe']}; {metric} in per cent.", ""]
    lines += [f"| backbone | weights | seeds | {metric} of each | mean | spread (max − min) | gain over {baseline} |", "| --- " * 7 + "|"]
    for label, row in content["backbones"].items():
        each, seeds = ", ".join(f"{100 * value:.1f}" for value in row["values"]), ", ".join(map(str, row["seeds"]))
        spread = "–" if row["spread"] is None else f"{100 * row['spread']:.1f}"
        figures = f"{100 * row['mean']:.1f} | {spread} | {100 * row['gain']:+.1f}"
        lines.append(f"| {label} | {row['weights']} | {seeds} | {each} | {figures} |")
    lines += [f"\n{label} alone: {' '.join(row['own'])}" for label, row in content["backbones"].items() if row["own"]]
    share = f"{100 * content['level']:.0f} % of {content['resamples']} draws of the test images"
    lines += ["", f"Gains between pairs, with the interval that holds {share}:", ""]
    lines += ["| from | to | gain | interval | share of draws above 0 |", "| --- " * 5 + "|"]
    for pair in content["pairs"]:
        between = f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}"
        lines.append(f"| {pair['first']} | {pair['second']} | {100 * pair['gain']:+.1f} | {between} | {pair['share_better']:.3f} |")
    return "\n".join(lines) + "\n"


def _baseline(wanted: str | None, labels: Sequence[str]) -> str:
    if wanted is None:
        return DEFAULT_BASELINE if DEFAULT_BASELINE in labels else labels[0]
    label = Contender(name=wanted).label
    if label not in labels:
        raise InputError(f"--baseline {wanted} takes no part;{nearest(label, labels)} choose from {', '.join(labels)}")
    return label


def _read_run(contender: Contender, config: DetectionConfig, folder: Path, source: Source) -> Run:
    detections = folder / "eval" / "detections.json"
    if source.metric == "voc":
        verdicts = voc_verdicts(voc_truth(source), detections)
    else:
        verdicts = coco_verdicts(source.annotation_file or source.annotations.to_coco(), detections, image_ids=coco_image_ids(source))
    metrics = json.loads((folder / "eval" / "metrics.json").read_text())
    weights, seed = config.model.weights or config.model.backbone.weights, config.train.seed
    return Run(contender=contender, weights=weights, seed=seed, folder=folder, metrics=metrics, verdicts=verdicts)


def _row(group: Sequence[Run], metric: str) -> dict[str, Any]:
    values = [run.metrics[metric] for run in group]
    return {
        "weights": group[0].weights,
        "own": list(group[0].contender.own),
        "seeds": [run.seed for run in group],
        "values": values,
        "mean": float(np.mean(values)),
        "spread": max(values) - min(values) if len(values) > 1 else None,  # one run says nothing of others
        "folders": [str(run.folder) for run in group],
    }


def _pairs(of: dict[str, list[Run]], resamples: int) -> list[dict[str, Any]]:
    drawn = {label: _drawn([run.verdicts for run in group], resamples, seed=0) for label, group in of.items()}
    found = []
    for first, second in combinations(drawn, 2):
        gain, better = interval_of(drawn[second] - drawn[first], LEVEL)
        found.append({"first": first, "second": second, "gain": gain.value, "low": gain.low, "high": gain.high, "share_better": better})
    return found


def _drawn(verdicts: Sequence[Verdicts], resamples: int, seed: int) -> np.ndarray:
    """(1 + resamples,) the mean over runs of their figure: on all images, then on each draw; the draws are the seed's alone."""
    times = draws(verdicts[0].images, resamples=resamples, seed=seed)
    return np.mean([mean_aps(one, times) for one in verdicts], axis=0)


def _plot(path: Path, rows: dict[str, dict], metric: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.3 * len(rows), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(rows.values()):
        axes.bar(place, 100 * row["mean"], width=0.6, color="#4878a8")
        axes.plot([place] * len(row["values"]), [100 * value for value in row["values"]], "o", color="#222222", markersize=5)
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_ylabel(f"{metric}, per cent")
    axes.set_title("mean (bar) and each seed (dots)", fontsize=10)
    figure.savefig(path, dpi=110)

"""Random COCO truth and detections, nasty on purpose: crowds, ties, zero areas, images and categories without objects, > 100 detections."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from detection.evaluation.voc import VocTruth

Row = dict[str, Any]


def random_case(seed: int, iou_type: str) -> tuple[Row, list[Row]]:
    """(ground truth, result rows) for "bbox", "segm" or "keypoints"."""
    draw = np.random.default_rng(seed)
    largest = 300 if draw.random() < 0.3 else 60
    images = [
        {"id": int(number), "height": int(draw.integers(5, largest)), "width": int(draw.integers(5, largest)), "file_name": "x"}
        for number in draw.permutation(50)[: draw.integers(1, 7)]
    ]
    categories = [{"id": int(number), "name": f"c{number}"} for number in draw.permutation(90)[: draw.integers(1, 5)]]
    objects = [
        _object(draw, number, image, int(draw.choice([one["id"] for one in categories[:-1] or categories])), iou_type)
        for number, image in enumerate((image for image in images if draw.random() < 0.8 for _ in range(draw.integers(1, 9))), start=1)
    ]
    most = int(draw.choice([1, 12, 250], p=[0.05, 0.8, 0.15]))
    has_ties = draw.random() < 0.5
    rows = []
    for image in images:
        for _ in range(draw.integers(0, most)):
            row = _detection(draw, image, objects, [one["id"] for one in categories], iou_type)
            rows.append(row | {"score": float(draw.choice([0.1, 0.5, 0.5, 0.9]) if has_ties else draw.random())})
    order = draw.permutation(len(rows))
    return {"images": images, "annotations": objects, "categories": categories}, [rows[i] for i in order]


def _box(draw: np.random.Generator, image: Row) -> list[float]:
    box = draw.random(4) * [image["width"], image["height"], image["width"] * 0.7, image["height"] * 0.7]
    box = np.floor(box) if draw.random() < 0.6 else box
    if draw.random() < 0.05:
        box[2 + draw.integers(0, 2)] = 0
    return [float(side) for side in box]


def _object(draw: np.random.Generator, number: int, image: Row, category: int, iou_type: str) -> Row:
    box, is_crowd = _box(draw, image), bool(draw.random() < 0.15)
    area = float(draw.choice([0, 32**2, 96**2])) if draw.random() < 0.1 else box[2] * box[3] * float(draw.choice([1.0, draw.random()]))
    common = {"id": number, "image_id": image["id"], "category_id": category, "bbox": box, "area": area, "iscrowd": int(is_crowd)}
    if iou_type == "segm":
        common["segmentation"] = _coded(draw, image) if is_crowd or draw.random() < 0.5 else _polygons(draw, image, box)
    if iou_type == "keypoints":
        points = _points(draw, box)
        common |= {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3])}
    return common


def _detection(draw: np.random.Generator, image: Row, objects: list[Row], categories: list[int], iou_type: str) -> Row:
    """Of the object of this image it is near, or of nothing."""
    own = [one for one in objects if one["image_id"] == image["id"]]
    near = own[draw.integers(0, len(own))] if own and draw.random() < 0.7 else None
    category = near["category_id"] if near is not None and draw.random() < 0.8 else int(draw.choice(categories))
    row = {"image_id": image["id"], "category_id": category}
    shift = draw.integers(-2, 3) if draw.random() < 0.6 else 0  # often exactly the object
    if iou_type == "bbox":
        box = near["bbox"] if near is not None else _box(draw, image)
        return row | {"bbox": [max(0.0, side + float(shift)) for side in box]}
    if iou_type == "segm":
        return row | {"segmentation": _coded(draw, image) if near is None else _shifted(near["segmentation"], image, int(shift))}
    points = np.array(near["keypoints"] if near is not None else _points(draw, _box(draw, image)))
    return row | {"keypoints": (points + shift * draw.random(51)).tolist()}


def _points(draw: np.random.Generator, box: list[float]) -> list[float]:
    x, y, width, height = box
    visible = draw.integers(0, 3, 17) * (draw.random() < 0.85)
    points = np.column_stack((x + draw.random(17) * width, y + draw.random(17) * height, visible))
    return [float(value) for value in points.flatten()]


def _polygons(draw: np.random.Generator, image: Row, box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    first = np.abs([x, y, x + w, y, x + w, y + h, x, y + h] + draw.normal(0, 1, 8) * (draw.random() < 0.3))
    return [first.tolist()] if draw.random() < 0.7 else [first.tolist(), *_polygons(draw, image, _box(draw, image))]


def _coded(draw: np.random.Generator, image: Row) -> Row:
    """A rectangle, an ellipse, a rectangle with holes, or nothing, as compressed or plain run lengths."""
    size = (image["height"], image["width"])
    rows, columns = np.mgrid[: size[0], : size[1]]
    y, x, h, w = (int(draw.integers(low, high)) for low, high in ((0, size[0]), (0, size[1]), (1, size[0]), (1, size[1])))
    mask = (rows >= y) & (rows < y + h) & (columns >= x) & (columns < x + w)
    kind = draw.integers(0, 4)
    if kind == 1:
        mask = ((rows - y) / h) ** 2 + ((columns - x) / w) ** 2 < 1
    mask = mask & (draw.random(size) < 0.8) if kind == 2 else mask & (kind != 3)
    return plain_runs(mask) if draw.random() < 0.2 else encoded(mask)


def encoded(mask: np.ndarray) -> Row:
    """COCO's compressed run lengths."""
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def plain_runs(mask: np.ndarray) -> Row:
    """The same as a list."""
    flat = mask.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, len(flat)]).tolist()}


def _shifted(segmentation: Any, image: Row, by: int) -> Row:
    height, width = image["height"], image["width"]
    code = coco_mask.frPyObjects(segmentation, height, width) if isinstance(segmentation, list) else segmentation
    if isinstance(code, dict) and isinstance(code["counts"], list):
        code = coco_mask.frPyObjects(code, height, width)
    return encoded(np.roll(coco_mask.decode(coco_mask.merge(code) if isinstance(code, list) else code), by, axis=0))


def copied_voc(truth: VocTruth, rows: list[dict[str, Any]], times: np.ndarray) -> tuple[VocTruth, list[dict[str, Any]]]:
    """VOC's truth and detections with image i there times[i] times, each copy an image of its own."""
    chosen = [(i, copy) for i, count in enumerate(times.tolist()) for copy in range(count)]
    objects = [np.flatnonzero(truth.image_of == i) for i, _ in chosen]
    flat = np.concatenate(objects)
    more = VocTruth(
        classes=truth.classes,
        image_ids=tuple(f"{truth.image_ids[i]}_{copy}" for i, copy in chosen),
        image_of=np.repeat(np.arange(len(chosen)), [len(one) for one in objects]),
        labels=truth.labels[flat],
        boxes=truth.boxes[flat],
        difficult=truth.difficult[flat],
    )
    found = [
        row | {"image_id": f"{truth.image_ids[i]}_{copy}"} for i, copy in chosen for row in rows if row["image_id"] == truth.image_ids[i]
    ]
    return more, found

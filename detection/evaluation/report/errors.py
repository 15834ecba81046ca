"""Why detections are wrong, and what each kind costs: TIDE (Bolya et al. 2020, §2) at IoU 0.5, with 0.1 as the border of the background.

A detection that COCO's matching leaves without an object is, by the first of these that holds (own: with objects of its class):

    localisation    its best own IoU lies in [0.1, 0.5)
    classification  its IoU with an object of another class is 0.5 or more
    duplicate       its best own IoU is 0.5 or more: that object was taken by a surer one
    background      no object overlaps it by 0.1
    both            the rest: the wrong class, and in the wrong place

An object nobody took is missed, unless it is what a localisation or classification error was after. The cost of a kind is the AP50 gained
by an oracle that mends it: of the errors after one free object the surest becomes right, the others of that kind go; duplicate, background
and both go; missed objects are taken out of the count. As TIDE mends each kind alone, costs don't add up to 1 - AP50. Classes without
objects have no AP, as in COCO's means (TIDE's own tool counts their AP as 0, and an IoU of just 0.5 or 0.1 on the other side).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detection.evaluation.coco_matching import LEAST_IOU, CocoArrays, average_precision, match

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
RIGHT, IGNORED = -1, -2
IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class Errors:
    """D detections and G objects as in the arrays, K classes.

    kind: (D,) index into KINDS, RIGHT or IGNORED (it lies in a crowd or on a difficult object); target: (D,) the object it took or was
    after, -1 for none; missed: (G,) bool; ap: (K,) AP50, NaN without objects; cost: (6, K) AP50 gained with that kind mended.
    """

    kind: np.ndarray
    target: np.ndarray
    missed: np.ndarray
    ap: np.ndarray
    cost: np.ndarray

    def counts(self, label: np.ndarray, object_label: np.ndarray, classes: int) -> np.ndarray:
        """(6, K) how many errors of each kind; of detections by the class they claim, of missed objects by their own."""
        rows = [np.bincount(label[self.kind == kind], minlength=classes) for kind in range(MISSED)]
        return np.stack([*rows, np.bincount(object_label[self.missed], minlength=classes)])


def find_errors(arrays: CocoArrays) -> Errors:
    """The kind of every detection and object, and the cost of each kind."""
    found = match(arrays, iou=IOU)
    is_own = arrays.label[arrays.pair_detection] == arrays.object_label[arrays.pair_object]
    counts = ~arrays.object_crowd[arrays.pair_object]
    own_iou, own = _best(arrays, is_own & counts)
    other_iou, other = _best(arrays, ~is_own & counts)
    near, near_iou = np.where(own_iou >= other_iou, own, other), np.maximum(own_iou, other_iou)
    conditions = [found >= 0, (own_iou >= LEAST_IOU) & (own_iou < IOU), other_iou >= IOU, own_iou >= IOU, near_iou < LEAST_IOU]
    kind = np.select(conditions, [RIGHT, LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND], BOTH)
    target = np.select(conditions, [found, own, other, own, -1], near)
    is_crowd = np.append(arrays.object_crowd, False)  # -1 is no crowd
    kind[is_crowd[found]] = IGNORED
    is_taken = np.zeros(len(arrays.object_crowd), dtype=bool)
    is_taken[found[found >= 0]] = True
    stands_in = _stand_ins(kind, target, is_taken)
    is_wanted = np.zeros_like(is_taken)
    is_wanted[target[stands_in]] = True
    missed = ~is_taken & ~is_wanted & ~arrays.object_crowd
    ap, cost = _costs(arrays, kind, target, stands_in, missed)
    return Errors(kind=kind, target=target, missed=missed, ap=ap, cost=cost)


def _best(arrays: CocoArrays, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(highest IoU, its object) of each detection among the `chosen` pairs, (D,) each; 0 and -1 without one, of equals the first."""
    iou, best = np.zeros(len(arrays.score)), np.full(len(arrays.score), -1)
    pairs = np.flatnonzero(chosen)
    order = pairs[np.lexsort((pairs, -arrays.pair_iou[pairs], arrays.pair_detection[pairs]))]
    detection, first = np.unique(arrays.pair_detection[order], return_index=True)
    iou[detection], best[detection] = arrays.pair_iou[order[first]], arrays.pair_object[order[first]]
    return iou, best


def _stand_ins(kind: np.ndarray, target: np.ndarray, is_taken: np.ndarray) -> np.ndarray:
    """Positions of the surest detection after each free object, by localisation or classification."""
    after = np.flatnonzero((kind == LOCALISATION) | (kind == CLASSIFICATION))
    after = after[~is_taken[target[after]]]
    _, first = np.unique(target[after], return_index=True)
    return after[first]


def _costs(
    arrays: CocoArrays, kind: np.ndarray, target: np.ndarray, stands_in: np.ndarray, missed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(K,) AP50 and (6, K) what it gains with one kind mended."""
    classes = len(arrays.category_ids)
    objects = np.bincount(arrays.object_label[~arrays.object_crowd], minlength=classes)
    shown, is_true = kind != IGNORED, kind == RIGHT
    ap = _class_aps(arrays.label, is_true, shown, objects)
    mended = []
    for one in range(MISSED):
        chosen = stands_in[kind[stands_in] == one]  # none but of localisation and classification
        label, is_mended = arrays.label.copy(), is_true.copy()
        label[chosen], is_mended[chosen] = arrays.object_label[target[chosen]], True
        mended.append(_class_aps(label, is_mended, shown & ((kind != one) | is_mended), objects))
    left = objects - np.bincount(arrays.object_label[missed], minlength=classes)
    mended.append(np.where(objects > 0, np.nan_to_num(_class_aps(arrays.label, is_true, shown, left)), np.nan))
    return ap, np.stack(mended) - ap


def _class_aps(label: np.ndarray, is_true: np.ndarray, shown: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(K,) AP50, NaN for a class without objects."""
    aps = np.full(len(objects), np.nan)
    for one in np.flatnonzero(objects):
        aps[one] = average_precision(is_true[shown & (label == one)], objects=int(objects[one]))
    return aps

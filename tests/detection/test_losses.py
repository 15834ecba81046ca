"""Loss terms worked by hand, and the divisor that makes many processes one."""

from __future__ import annotations

import math

import pytest
import torch

from detection import losses
from detection.losses import mask_loss, roi_losses, rpn_losses, shared_count


def test_rpn_by_hand():
    logits = torch.tensor([0.0, 0.0, 0.0, 0.0])
    deltas, wanted = torch.tensor([[0.0, 0.0, 1.0, 1 / 18]]), torch.zeros((1, 4))
    is_object, is_used = torch.tensor([True, False, False, False]), torch.ones(4, dtype=torch.bool)
    terms = rpn_losses(logits, is_object, deltas, wanted, is_used=is_used, count=torch.tensor(4.0))
    assert terms["rpn_objectness"].item() == pytest.approx(math.log(2))
    # Straight at 1: 1 - 1/18; square at 1/18: 0.5 · (1/18)² · 9.
    assert terms["rpn_box"].item() == pytest.approx((1 - 1 / 18 + 4.5 / 18**2) / 4)


def test_roi_by_hand():
    logits = torch.zeros((2, 3))
    deltas = torch.zeros((2, 12))
    deltas[0, 8] = 2.0  # class 2, the right one
    deltas[0, 4] = 100.0  # class 1, not asked
    deltas[1] = 100.0  # background has no box
    terms = roi_losses(logits, torch.tensor([2, 0]), deltas, torch.zeros((1, 4)), reserved=torch.tensor([0]), count=torch.tensor(2.0))
    assert terms["roi_class"].item() == pytest.approx(math.log(3))
    assert terms["roi_box"].item() == pytest.approx((2 - 1 / 18) / 2)


def test_mask_by_hand():
    logits = torch.zeros((1, 3, 2, 2))
    logits[0, 1] = 100.0  # another class doesn't count
    terms = mask_loss(logits, torch.tensor([2]), torch.tensor([[[1.0, 0.0], [0.5, 1.0]]]), count=torch.tensor(1.0))
    assert terms["mask"].item() == pytest.approx(math.log(2))


def test_places_without_a_sample_take_no_part():
    """Whatever stands there, even no number at all in what is wanted of it; nor have they gradients."""
    logits = torch.tensor([0.5, -0.3, math.inf], requires_grad=True)
    deltas = torch.cat((torch.rand((1, 4)), torch.full((1, 4), math.nan))).requires_grad_()
    wanted = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.inf, math.nan, 1.0, -math.inf]])
    is_object, is_used = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    terms = rpn_losses(logits, is_object, deltas, wanted, is_used=is_used, count=torch.tensor(2.0))
    fewer = rpn_losses(logits[:2], is_object[:2], deltas[:1], wanted[:1], is_used=is_used[:2], count=torch.tensor(2.0))
    for name, term in terms.items():
        torch.testing.assert_close(term, fewer[name])
    sum(terms.values()).backward()
    assert logits.grad[2] == 0
    assert not deltas.grad[1].any()
    assert deltas.grad[0].any()
    class_logits = torch.cat((torch.randn((2, 3)), torch.full((1, 3), math.inf))).requires_grad_()
    regressed = torch.cat((torch.randn((1, 12)), torch.full((2, 12), math.nan))).requires_grad_()
    labels, reserved = torch.tensor([2, 0, losses.NO_LABEL]), torch.tensor([0, 1, 2])
    wanted = torch.tensor([[0.1, 0.2, 0.3, 0.4], [math.nan] * 4, [math.inf] * 4])
    terms = roi_losses(class_logits, labels, regressed, wanted, reserved=reserved, count=torch.tensor(2.0))
    fewer = roi_losses(class_logits[:2], labels[:2], regressed[:2], wanted[:1], reserved=reserved[:1], count=torch.tensor(2.0))
    for name, term in terms.items():
        torch.testing.assert_close(term, fewer[name])
    sum(terms.values()).backward()
    assert not class_logits.grad[2].any()
    assert not regressed.grad[1:].any()
    assert regressed.grad[0].any()
    mask_logits = torch.cat((torch.randn((1, 3, 2, 2)), torch.full((2, 3, 2, 2), math.inf))).requires_grad_()
    masks = torch.rand((3, 2, 2))
    term, alone = (mask_loss(*(part[:n] for part in (mask_logits, labels, masks)), count=torch.tensor(1.0))["mask"] for n in (3, 1))
    torch.testing.assert_close(term, alone)
    term.backward()
    assert not mask_logits.grad[1:].any()
    assert mask_logits.grad[0].any()


def test_nothing_sampled_is_zero():
    empty = torch.zeros((0, 4))
    none = torch.zeros((0,), dtype=torch.int64)
    count = shared_count(none.bool(), across_processes=False)
    terms = rpn_losses(torch.zeros(0), none.bool(), empty, empty, is_used=none.bool(), count=count)
    terms |= roi_losses(torch.zeros((0, 3)), none, torch.zeros((0, 12)), empty, reserved=none, count=count)
    terms |= mask_loss(torch.zeros((0, 3, 28, 28)), none, torch.zeros((0, 28, 28)), count=count)
    assert set(terms) == {"rpn_objectness", "rpn_box", "roi_class", "roi_box", "mask"}
    assert all(value.item() == 0 for value in terms.values())


def test_count_is_shared_only_where_processes_train_together(monkeypatch):
    monkeypatch.setattr(losses, "mean_across_processes", lambda value: (value + 20) / 2)  # another process has sampled 20
    used = torch.arange(14) < 10
    assert shared_count(used, across_processes=True).item() == 15
    assert shared_count(used, across_processes=False).item() == 10


def test_half_precision_logits_are_summed_in_full():
    logits = torch.full((3000,), 0.1, dtype=torch.bfloat16)
    all_of_them, none = torch.ones(3000, dtype=torch.bool), torch.zeros((0, 4))
    terms = rpn_losses(logits, all_of_them, none, none, is_used=all_of_them, count=torch.tensor(3000.0))
    assert terms["rpn_objectness"].dtype == torch.float32
    assert terms["rpn_objectness"].item() == pytest.approx(math.log(1 + math.exp(-logits[0].item())), rel=1e-5)

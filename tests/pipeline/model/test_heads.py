from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.features.affinity import N_AFFINITY_FEATURES, SAME_ITEM
from pipeline.features.visit_frequency import N_VISIT_FEATURES
from pipeline.model.heads import N_RECENT, HeadContext, RecentEvents, TaskHeads, head_losses

ITEMS, WIDTH = 20, 8
CPU = torch.device("cpu")


def heads_of(seed: int = 0) -> TaskHeads:
    torch.manual_seed(seed)
    heads = TaskHeads(ITEMS, WIDTH).eval()
    torch.nn.init.normal_(heads.interaction.item_bias.weight)
    return heads


def units(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, WIDTH), dim=-1)


def context_of(lengths: list[int], k: int = 1) -> HeadContext:
    newest, rows = RecentEvents.from_offsets(np.cumsum([0, *lengths]), CPU), sum(lengths) + 1
    affinity = torch.rand(len(lengths), k, N_AFFINITY_FEATURES)
    return HeadContext(
        torch.randn(rows, WIDTH), units(rows), newest, torch.rand(len(lengths), N_VISIT_FEATURES), affinity
    )


def test_unknown_labels_do_not_count_in_the_loss() -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    known = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    padded = torch.cat([known, torch.full((2, 3), torch.nan)])
    torch.testing.assert_close(head_losses(logits, padded), torch.full((3,), np.log(2).item()))
    head_losses(logits, padded).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[2:] == 0).all()
    torch.testing.assert_close(head_losses(logits, torch.full((4, 3), torch.nan)), torch.zeros(3))


def test_each_item_of_a_slate_and_each_user_of_a_batch_has_its_own_odds() -> None:
    heads, context = heads_of(), context_of([3, 40, 1], k=5)
    states, items, tokens = torch.randn(3, WIDTH), units(3, 5), torch.randint(ITEMS, (3, 5))
    together = heads(states, tokens, items, context)
    assert together.shape == (3, 5, 3)
    rows = RecentEvents(context.recent.rows[1:2], context.recent.missing[1:2])
    alone = HeadContext(context.events, context.items, rows, context.visit_frequency[1:2], context.affinity[1:2, 4:])
    torch.testing.assert_close(heads(states[1:2], tokens[1:2, 4:], items[1:2, 4:], alone)[0, 0], together[1, 4])


def test_the_newest_events_are_named_newest_first_and_never_another_users() -> None:
    newest = RecentEvents.from_offsets(np.array([0, 2, 2, 50]), CPU)
    inside = ~newest.missing
    assert newest.rows[0, :2].tolist() == [1, 0]
    assert inside.sum(dim=1).tolist() == [2, 0, N_RECENT]
    assert newest.rows[2].tolist() == list(range(49, 49 - N_RECENT, -1))


def test_in_training_every_row_sees_what_serving_would_have_seen_at_its_time() -> None:
    every = RecentEvents.from_each_event(np.array([0, 3, 5]), CPU)
    for row, (start, end) in enumerate([(0, 1), (0, 2), (0, 3), (3, 4), (3, 5)]):
        then = RecentEvents.from_offsets(np.array([start, end]), CPU)
        torch.testing.assert_close(every.rows[row][~every.missing[row]], then.rows[0][~then.missing[0]])


def test_a_user_without_events_has_odds_that_no_other_users_events_move() -> None:
    heads, context = heads_of(), context_of([0, 4], k=2)
    states, items, tokens = torch.zeros(2, WIDTH), units(2, 2), torch.ones(2, 2, dtype=torch.int)
    before = heads(states, tokens, items, context)
    context.events = torch.randn_like(context.events)
    after = heads(states, tokens, items, context)
    assert before.isfinite().all()
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def test_what_was_done_with_the_very_item_weighs_more_than_what_was_done_with_others() -> None:
    heads, context = heads_of(), context_of([6])
    context.affinity[..., SAME_ITEM] = 0
    states, tokens = torch.zeros(1, WIDTH), torch.ones(1, 1, dtype=torch.int)

    def moved(item: int) -> float:
        asked, changed = context.items[item][None, None], context.events.clone()
        changed[0] += 1
        other = replace(context, events=changed)
        logits = heads(states, tokens, asked, other) - heads(states, tokens, asked, context)
        return logits.abs().max().item()

    assert moved(0) > 5 * max(moved(item) for item in range(1, 6))


def test_how_an_item_lies_to_the_history_moves_its_odds_and_never_retentions() -> None:
    heads, context = heads_of(), context_of([6], k=2)
    states, items, tokens = torch.randn(1, WIDTH), units(1, 2), torch.ones(1, 2, dtype=torch.int)
    before = heads(states, tokens, items, context)
    for column in range(N_AFFINITY_FEATURES):
        changed = context.affinity.clone()
        changed[0, 1, column] += 1
        moved = heads(states, tokens, items, replace(context, affinity=changed)) - before
        assert (moved[0, 1, [0, 2]].abs() > 1e-4).all()
        assert not moved[0, 0].any()
        assert not moved[0, 1, 1]


def test_retention_hangs_on_the_rhythm_and_the_item_and_not_on_what_the_user_likes() -> None:
    heads, context = heads_of(), context_of([5], k=2)
    tokens, items = torch.tensor([[1, 2]]), units(1, 2)
    logits = heads(torch.randn(1, WIDTH), tokens, items, context)[0]
    other = heads(torch.randn(1, WIDTH), tokens, items, context)[0]
    assert torch.equal(logits[:, 1], other[:, 1])
    assert not torch.allclose(logits[:, [0, 2]], other[:, [0, 2]])
    assert logits[0, 1] != logits[1, 1]
    context.visit_frequency += 1
    assert not torch.allclose(heads(torch.randn(1, WIDTH), tokens, items, context)[0, :, 1], logits[:, 1])


def test_an_item_that_came_after_training_has_the_unknown_items_bias() -> None:
    heads, context, items = heads_of(), context_of([5]), units(1, 1).expand(1, 4, WIDTH)
    context.affinity = context.affinity.expand(1, 4, N_AFFINITY_FEATURES)
    logits = heads(torch.randn(1, WIDTH), torch.tensor([[0, 1, ITEMS, ITEMS + 7]]), items, context)[0]
    torch.testing.assert_close(logits[2:], logits[:1].expand(2, 3))
    assert not torch.allclose(logits[1, [0, 2]], logits[0, [0, 2]])


def test_odds_are_the_logits_calibrated() -> None:
    heads = heads_of()
    heads.calibration = torch.tensor([[1.0, 0.0], [2.0, 0.5], [0.5, -1.0]])
    odds = heads.probabilities(torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(odds, torch.sigmoid(torch.tensor([0.0, 2.5, 0.0])))


def test_a_batch_of_no_users_has_no_odds() -> None:
    heads, context = heads_of(), context_of([], k=3)
    odds = heads(torch.zeros(0, WIDTH), torch.zeros(0, 3, dtype=torch.int), units(0, 3), context)
    assert odds.shape == (0, 3, 3)

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.features.affinity import N_AFFINITY_FEATURES, SAME_ITEM
from pipeline.features.visit_frequency import N_VISIT_FEATURES
from pipeline.model.heads import N_RECENT, HeadContext, RecentEvents, TaskHeads, head_losses

ITEMS = 20
WIDTH = 8
CPU = torch.device("cpu")


def make_heads(seed: int = 0) -> TaskHeads:
    torch.manual_seed(seed)
    heads = TaskHeads(ITEMS, WIDTH).eval()
    torch.nn.init.normal_(heads.interaction.item_bias.weight)
    return heads


def unit_vectors(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, WIDTH), dim=-1)


def make_context(lengths: list[int], k: int = 1) -> HeadContext:
    """Return a random context of users of these lengths and k candidates each; no user owns the last event row."""
    rows = sum(lengths) + 1
    affinity = torch.rand(len(lengths), k, N_AFFINITY_FEATURES)
    return HeadContext(
        events=torch.randn(rows, WIDTH),
        items=unit_vectors(rows),
        recent=RecentEvents.from_offsets(torch.tensor([0, *lengths]).cumsum(0)),
        visit_frequency=torch.rand(len(lengths), N_VISIT_FEATURES),
        affinity=affinity,
    )


def test_nan_labels_do_not_count_in_the_loss() -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    padded = torch.cat([labels, torch.full((2, 3), torch.nan)])
    torch.testing.assert_close(head_losses(logits, padded), torch.full((3,), np.log(2).item()))
    head_losses(logits, padded).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[2:] == 0).all()
    torch.testing.assert_close(head_losses(logits, torch.full((4, 3), torch.nan)), torch.zeros(3))


def test_logits_do_not_depend_on_the_rest_of_slate_and_batch() -> None:
    heads = make_heads()
    context = make_context([3, 40, 1], k=5)
    states = torch.randn(3, WIDTH)
    items = unit_vectors(3, 5)
    item_rows = torch.randint(ITEMS, (3, 5))
    together = heads(states, item_rows, items, context)
    assert together.shape == (3, 5, 3)
    alone = HeadContext(
        events=context.events,
        items=context.items,
        recent=RecentEvents(context.recent.rows[1:2], context.recent.missing[1:2]),
        visit_frequency=context.visit_frequency[1:2],
        affinity=context.affinity[1:2, 4:],
    )
    logits = heads(states[1:2], item_rows[1:2, 4:], items[1:2, 4:], alone)
    torch.testing.assert_close(logits[0, 0], together[1, 4])


def test_recent_events_are_the_users_own_newest_first() -> None:
    recent = RecentEvents.from_offsets(torch.tensor([0, 2, 2, 50]))
    assert recent.rows[0, :2].tolist() == [1, 0]
    assert (~recent.missing).sum(dim=1).tolist() == [2, 0, N_RECENT]
    assert recent.rows[2].tolist() == list(range(49, 49 - N_RECENT, -1))


def test_recent_events_of_each_event_are_those_of_serving_at_its_time() -> None:
    every = RecentEvents.from_each_event(np.array([0, 3, 5]), CPU)
    for row, (start, end) in enumerate([(0, 1), (0, 2), (0, 3), (3, 4), (3, 5)]):
        served = RecentEvents.from_offsets(torch.tensor([start, end]))
        torch.testing.assert_close(every.rows[row][~every.missing[row]], served.rows[0][~served.missing[0]])


def test_other_users_events_do_not_move_a_user_without_events() -> None:
    heads = make_heads()
    context = make_context([0, 4], k=2)
    states = torch.zeros(2, WIDTH)
    items = unit_vectors(2, 2)
    item_rows = torch.ones(2, 2, dtype=torch.int)
    before = heads(states, item_rows, items, context)
    context.events = torch.randn_like(context.events)
    after = heads(states, item_rows, items, context)
    assert before.isfinite().all()
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def test_event_of_the_same_item_weighs_more_than_those_of_others() -> None:
    heads = make_heads()
    context = make_context([6])
    context.affinity[..., SAME_ITEM] = 0
    states = torch.zeros(1, WIDTH)
    item_rows = torch.ones(1, 1, dtype=torch.int)

    def effect_of_first_event(candidate: int) -> float:
        items = context.items[candidate][None, None]
        events = context.events.clone()
        events[0] += 1
        changed = replace(context, events=events)
        difference = heads(states, item_rows, items, changed) - heads(states, item_rows, items, context)
        return difference.abs().max().item()

    assert effect_of_first_event(0) > 5 * max(effect_of_first_event(item) for item in range(1, 6))


def test_affinity_moves_all_logits_of_its_item_but_retention() -> None:
    heads = make_heads()
    context = make_context([6], k=2)
    states = torch.randn(1, WIDTH)
    items = unit_vectors(1, 2)
    item_rows = torch.ones(1, 2, dtype=torch.int)
    before = heads(states, item_rows, items, context)
    for column in range(N_AFFINITY_FEATURES):
        affinity = context.affinity.clone()
        affinity[0, 1, column] += 1
        difference = heads(states, item_rows, items, replace(context, affinity=affinity)) - before
        assert (difference[0, 1, [0, 2]].abs() > 1e-4).all()
        assert not difference[0, 0].any()
        assert not difference[0, 1, 1]


def test_retention_depends_on_visit_frequency_and_item_alone() -> None:
    heads = make_heads()
    context = make_context([5], k=2)
    item_rows = torch.tensor([[1, 2]])
    items = unit_vectors(1, 2)
    logits = heads(torch.randn(1, WIDTH), item_rows, items, context)[0]
    other_state = heads(torch.randn(1, WIDTH), item_rows, items, context)[0]
    assert torch.equal(logits[:, 1], other_state[:, 1])
    assert not torch.allclose(logits[:, [0, 2]], other_state[:, [0, 2]])
    assert logits[0, 1] != logits[1, 1]
    context.visit_frequency += 1
    other_frequency = heads(torch.randn(1, WIDTH), item_rows, items, context)[0]
    assert not torch.allclose(other_frequency[:, 1], logits[:, 1])


def test_item_that_came_after_training_has_the_unknown_items_bias() -> None:
    heads = make_heads()
    context = make_context([5])
    context.affinity = context.affinity.expand(1, 4, N_AFFINITY_FEATURES)
    items = unit_vectors(1, 1).expand(1, 4, WIDTH)
    item_rows = torch.tensor([[0, 1, ITEMS, ITEMS + 7]])
    logits = heads(torch.randn(1, WIDTH), item_rows, items, context)[0]
    torch.testing.assert_close(logits[2:], logits[:1].expand(2, 3))
    assert not torch.allclose(logits[1, [0, 2]], logits[0, [0, 2]])


def test_probabilities_are_calibrated_logits() -> None:
    heads = make_heads()
    heads.calibration = torch.tensor([[1.0, 0.0], [2.0, 0.5], [0.5, -1.0]])
    probabilities = heads.probabilities(torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(probabilities, torch.sigmoid(torch.tensor([0.0, 2.5, 0.0])))


def test_batch_without_users_gives_no_logits() -> None:
    heads = make_heads()
    context = make_context([], k=3)
    logits = heads(torch.zeros(0, WIDTH), torch.zeros(0, 3, dtype=torch.int), unit_vectors(0, 3), context)
    assert logits.shape == (0, 3, 3)

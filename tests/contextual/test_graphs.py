"""Captured passes: which shape a batch runs by, and that its loss and gradients are those of the uncaptured pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.graphs import GraphedLoss
from sparselora.contextual.handle import sparsify
from sparselora.contextual.layout import TokenLayout
from tests.helpers.contextual_models import tiny


def layout_of(lengths: list[int], labelled: int, multiple: int = 8) -> TokenLayout:
    """Rows of some lengths, the last tokens labelled; as one that was moved to a device."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = torch.where(mask.cumsum(1) > mask.sum(1, keepdim=True) - labelled, mask, -100)
    layout = TokenLayout.build(mask, torch.where(mask == 1, labels, -100), multiple=multiple)
    return replace(layout, host=layout)


def with_graph(graphs: GraphedLoss, state: str, layout: TokenLayout) -> None:
    graphs._graphs[state, layout.n_context, layout.n_output, layout.batch, layout.width] = None


@pytest.mark.parametrize("extra", [(0, 0, 0), (8, 0, 8), (5, 3, 16)])
def test_a_layout_padded_further_holds_the_same_tokens_at_the_same_columns(extra):
    layout = layout_of([21, 13, 30], 4)
    padded = layout.graph
    assert padded is not None
    context, output, width = (a + b for a, b in zip((padded.n_context, padded.n_output, padded.width), extra))
    wider = layout.padded_to(context, output, width)
    assert (wider.n_context, wider.n_output, wider.width) == (context, output, width)
    for start, stop, first in ((0, layout.n_context, 0), (layout.n_context, layout.n, context)):
        rows = slice(first, first + stop - start)
        assert torch.equal(wider.tokens[rows], layout.tokens[start:stop])
        assert torch.equal(wider.slots[rows] // width, layout.slots[start:stop] // layout.width)
        assert torch.equal(wider.slots[rows] % width, layout.slots[start:stop] % layout.width)
    assert len(wider.slots.unique()) == len(wider.slots)
    assert int((wider.targets != -100).sum()) == layout.n_output


def test_a_new_shape_runs_by_a_graph_that_is_little_larger_and_by_its_own_the_second_time():
    graphs = GraphedLoss([])
    small, large = layout_of([100, 90, 80], 16), layout_of([104, 96, 96], 16)
    assert graphs.fitting("state", small) is small.graph  # there is no graph yet
    with_graph(graphs, "state", large.graph)
    first = graphs.fitting("state", small)
    assert (first.n_context, first.n_output, first.width) == (
        large.graph.n_context,
        large.graph.n_output,
        large.graph.width,
    )
    assert graphs.fitting("state", small) is small.graph
    assert graphs.fitting("another", layout_of([100, 90, 81], 16)).n < large.graph.n  # of another state


def test_a_graph_that_is_much_larger_is_not_taken():
    graphs = GraphedLoss([])
    with_graph(graphs, "state", layout_of([200, 200, 200], 16).graph)
    small = layout_of([100, 90, 80], 16)
    assert graphs.fitting("state", small) is small.graph


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"context_backward": "none"}, {"frozen_precision": "fp8_emulated"}], ids=str)
def test_a_replayed_pass_is_the_uncaptured_one(settings):
    model = tiny("llama").float().cuda()
    trained = [p for p in model.parameters() if p.requires_grad]
    handle = sparsify(model, SparsityConfig(mode="dense", **settings))
    generator = torch.Generator().manual_seed(5)
    for lengths in ([28, 21, 25], [28, 21, 25], [27, 20, 25], [28, 21, 25], [26, 20, 24]):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(2, 64, mask.shape, generator=generator)
        labels = torch.where((mask == 1) & (mask.cumsum(1) > 12), ids, -100)
        results = []
        for multiple in (8, 0):
            layout = TokenLayout.build(mask, labels, multiple=multiple).to("cuda")
            batch = {"input_ids": ids.cuda(), "attention_mask": mask.cuda(), "labels": labels.cuda()}
            loss = model(**batch, token_layout=layout).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, trained)])
        for graphed, plain in zip(*results):
            torch.testing.assert_close(graphed, plain, rtol=1e-3, atol=1e-5)
    captures, replays = handle.graphs
    assert captures >= 1
    assert replays >= 3

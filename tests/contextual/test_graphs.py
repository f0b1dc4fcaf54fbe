"""Captured passes: their loss and gradients are those of the uncaptured pass."""

from __future__ import annotations

import pytest
import torch

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual.handle import sparsify
from sparselora.contextual.layout import TokenLayout
from tests.helpers.contextual_models import tiny


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

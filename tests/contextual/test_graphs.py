"""Captured passes: which shapes are captured and when, and that a captured pass equals the uncaptured one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparselora.config.sparsity import SparsityConfig
from sparselora.contextual import graphs as graphs_module
from sparselora.contextual.activated import invocation_starts
from sparselora.contextual.graphs import Fit, GraphedLoss
from sparselora.contextual.handle import Handle, sparsify
from sparselora.contextual.layout import TokenLayout
from sparselora.contextual.lora_update import stand_ins
from sparselora.contextual.step import Step
from tests.contextual.test_activated_lora import INVOCATION, adapted, invoked
from tests.contextual.test_sampled_context import conversations
from tests.helpers.contextual_models import ragged, tiny

STATE = "state"


def layout_of(lengths: list[int], labelled: list[int], multiple: int = 128) -> TokenLayout:
    """Rows of some lengths, their last tokens labelled; as one that was moved to a device."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    is_labelled = mask.cumsum(1) > torch.tensor([n - k for n, k in zip(lengths, labelled)])[:, None]
    labels = torch.where(is_labelled & (mask == 1), mask, -100)
    layout = TokenLayout.build(mask, labels, multiple=multiple)
    return replace(layout, host=layout)


def random_layouts(count: int, seed: int = 0) -> list[TokenLayout]:
    """Layouts of 8 rows of 256 to 512 tokens, a tenth to four tenths labelled."""
    generator = torch.Generator().manual_seed(seed)
    layouts = []
    for _ in range(count):
        lengths = torch.randint(256, 513, (8,), generator=generator).tolist()
        shares = (0.1 + 0.3 * torch.rand(8, generator=generator)).tolist()
        layouts.append(layout_of(lengths, [round(share * n) for share, n in zip(shares, lengths)]))
    return layouts


def shape(layout: TokenLayout) -> tuple[int, int, int]:
    return layout.n_context, layout.n_output, layout.width


class Recorded(GraphedLoss):
    """Fitting as it is; a capture only notes its shape."""

    def __init__(self) -> None:
        super().__init__([])
        self._seen.add(STATE)

    def hold(self, layout: TokenLayout) -> None:
        graph: Any = None
        self._graphs[graphs_module._shape(STATE, layout)] = graph
        self.captures += 1

    def run(self, layout: TokenLayout) -> Fit:
        fit = self.fitting(STATE, layout)
        if graphs_module._shape(STATE, fit.layout) not in self._graphs:
            self.hold(fit.layout)
        if fit.due is not None:
            self.hold(fit.due)
        return fit


# --- which shapes are captured --------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [(0, 0, 0), (8, 0, 8), (5, 3, 16)])
def test_a_layout_padded_further_holds_the_same_tokens_at_the_same_columns(extra):
    layout = layout_of([21, 13, 30], [4, 4, 4], 8)
    padded = layout.graph
    assert padded is not None
    context, output, width = (a + b for a, b in zip(shape(padded), extra))
    wider = layout.padded_to((0, 0, context, output), width)
    assert shape(wider) == (context, output, width)
    for start, stop, first in ((0, layout.n_context, 0), (layout.n_context, layout.n, context)):
        rows = slice(first, first + stop - start)
        assert torch.equal(wider.tokens[rows], layout.tokens[start:stop])
        assert torch.equal(wider.slots[rows] // width, layout.slots[start:stop] // layout.width)
        assert torch.equal(wider.slots[rows] % width, layout.slots[start:stop] % layout.width)
    assert len(wider.slots.unique()) == len(wider.slots)
    assert int((wider.targets != -100).sum()) == layout.n_output


def test_few_shapes_are_captured_and_little_is_padded():
    layouts = random_layouts(96)
    recorded = Recorded()
    fits = [recorded.run(layout) for layout in layouts]
    padding = sum(fit.layout.n for fit in fits) / sum(layout.n for layout in layouts)
    exact = {shape(layout.graph) for layout in layouts if layout.graph is not None}
    assert recorded.captures <= 10 < 15 <= len(exact)  # the control: a graph for every shape
    assert padding < 1.11
    later = random_layouts(96, seed=1)
    padded_later = sum(recorded.run(layout).layout.n for layout in later) / sum(layout.n for layout in later)
    assert padded_later < padding


def test_every_fit_holds_its_batch_and_is_captured_by_then():
    recorded = Recorded()
    for layout in random_layouts(30, seed=2):
        fitted = recorded.run(layout).layout
        assert layout.graph is not None
        assert all(a >= b for a, b in zip(shape(fitted), shape(layout.graph)))
        assert fitted.batch * fitted.width >= fitted.n
        assert int((fitted.targets != -100).sum()) == layout.n_output


def test_a_shape_is_captured_by_itself_once_a_larger_graph_has_cost_as_much():
    recorded = Recorded()
    layout, larger = layout_of([450] * 8, [100] * 8), layout_of([512] * 8, [100] * 8)
    assert layout.graph is not None
    recorded.hold(larger.graph)
    excess = larger.graph.n / layout.graph.n - 1
    assert 0 < excess < graphs_module._EXCESS_THAT_PAYS
    fits = [recorded.run(layout)]
    while fits[-1].due is None:
        fits.append(recorded.run(layout))
    assert {shape(fit.layout) for fit in fits} == {shape(larger.graph)}
    assert len(fits) * excess >= graphs_module._EXCESS_THAT_PAYS > (len(fits) - 1) * excess
    assert shape(recorded.run(layout).layout) == shape(layout.graph)


def test_a_graph_of_another_batch_size_or_state_or_far_larger_is_not_taken():
    recorded = Recorded()
    recorded.hold(layout_of([512] * 8, [100] * 8).graph)
    small = layout_of([100] * 8, [20] * 8)
    other_batch = layout_of([512] * 7, [60] * 7)
    for layout in (small, other_batch):
        fitted = recorded.fitting(STATE, layout).layout
        assert fitted.n <= 1.3 * layout.n
        assert fitted.batch == layout.batch
    full = layout_of([510] * 8, [90] * 8)
    assert recorded.fitting("another", full).layout is full.graph  # its first pass runs uncaptured


def test_no_more_graphs_than_the_most(monkeypatch):
    monkeypatch.setattr(graphs_module, "_MOST_GRAPHS", 2)
    recorded = Recorded()
    recorded.hold(layout_of([128] * 8, [20] * 8).graph)
    recorded.hold(layout_of([256] * 8, [20] * 8).graph)
    layout = layout_of([512] * 8, [20] * 8)
    assert recorded.fitting(STATE, layout) == Fit(layout.graph)
    assert recorded.fitting(STATE, layout_of([250] * 8, [5] * 8)).due is None


# --- padding has no effect ------------------------------------------------------------------------------------------


def losses_and_gradients(
    handle: Handle, batch: dict[str, torch.Tensor], layouts: list[TokenLayout], sparse: bool = False, **settings: Any
) -> list[list[torch.Tensor]]:
    """Loss and gradients of a pass over each layout of one batch, by the packed pass itself."""
    trained = [p for p in handle._structure.model.parameters() if p.requires_grad]
    results = []
    for layout in layouts:
        step = Step(layout, sparse, layout.n_context if sparse else 0, seed=0, **settings)
        assert handle._decoder is not None
        loss = handle._decoder.loss(step, batch["input_ids"], None, 9)
        results.append([loss.detach(), *torch.autograd.grad(loss, trained)])
    return results


def assert_equal(results: list[list[torch.Tensor]], limit: float = 1e-12) -> None:
    for padded in results[1:]:
        for ours, plain in zip(padded, results[0]):
            torch.testing.assert_close(ours, plain, rtol=100 * limit, atol=limit)


def wider(layout: TokenLayout) -> TokenLayout:
    return layout.padded_to([n + extra for n, extra in zip(layout.groups, (3, 2, 7, 5))], 40)


def is_unlike(results: list[list[torch.Tensor]], others: list[list[torch.Tensor]]) -> bool:
    return any(float((a - b).abs().max()) > 1e-4 for a, b in zip(results[0], others[0]))


@pytest.mark.parametrize("mode", ["dense", "svd"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_padding_changes_nothing_of_a_sampled_context(name, mode):
    model, batch = tiny(name), conversations()
    layers = {"layer.0": 0.6, "layer.2": 0.75, "layer.1-2.attention": 0.5} if mode == "svd" else {}
    settings = {"svd_rank": 4, "estimator_tokens": 7, "layer_sparsity": layers}
    handle = sparsify(model, SparsityConfig(mode=mode, context_backward="sampled", **settings))
    whole = TokenLayout.build(batch["attention_mask"], batch["labels"], multiple=8)
    results = {}
    for drawn in ([], [1], [0, 3]):
        layout = whole.sampled(drawn)
        assert layout.graph is not None
        layouts = [layout, layout.graph, wider(layout)]
        assert [len({x.n_detached, x.n_sampled, x.n_context}) for x in layouts[1:]] == [3 if drawn else 2, 3]
        results[tuple(drawn)] = losses_and_gradients(handle, batch, layouts, mode == "svd", sample_weight=2.0)
        assert_equal(results[tuple(drawn)])
    assert is_unlike(results[1,], results[0, 3])  # the control: another draw


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_padding_changes_nothing_of_an_activated_lora(name):
    model, batch = adapted(name), invoked()
    handle = sparsify(model, SparsityConfig(mode="dense"))
    starts = invocation_starts(batch["input_ids"], INVOCATION)
    whole = TokenLayout.build(batch["attention_mask"], batch["labels"], multiple=3)
    layout = whole.activated(starts)
    assert layout.graph is not None
    assert layout.graph.n_inactive == layout.graph.n_detached > layout.n_inactive > 0
    results = losses_and_gradients(handle, batch, [layout, layout.graph, wider(layout)])
    assert_equal(results)
    earlier = losses_and_gradients(handle, batch, [whole.activated(starts - 1)])
    assert is_unlike(results, earlier)  # the control: active on one more token


def test_a_layout_from_the_cpu_keeps_its_graph_when_its_context_is_drawn(monkeypatch):
    """On a GPU; here the device is the CPU, so the layout says by itself that it was moved from there."""
    model, batch = tiny("llama"), conversations()
    handle = sparsify(model, SparsityConfig(mode="dense", context_backward="sampled"))
    layout = TokenLayout.build(batch["attention_mask"], batch["labels"], multiple=8)
    moved = replace(layout, host=layout)
    handle.begin_step(0, 4)
    drawn = handle._new_step(moved).layout
    handle.begin_step(0, 4)
    again = handle._new_step(replace(layout, multiple=0, graph=None)).layout
    assert drawn.graph is not None
    assert again.graph is None
    assert torch.equal(drawn.tokens, again.tokens)
    assert drawn.groups == again.groups


@pytest.mark.parametrize("cut", [None, 0, 2])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_padding_changes_neither_loss_nor_gradients(name, cut):
    model, batch = tiny(name), ragged(name)
    handle = sparsify(model, SparsityConfig(mode="dense"))
    layout = TokenLayout.build(batch["attention_mask"], batch["labels"])
    layouts = [layout, layout.padded(8), layout.padded_to((0, 0, layout.n_context + 7, layout.n_output + 5), 40)]
    results = losses_and_gradients(handle, batch, layouts, attached_layers=cut)
    assert_equal(results)
    assert float(results[0][1].abs().max()) > 1e-6


# --- replays, by running them again on the CPU ------------------------------------------------------------------------


class Rerun(GraphedLoss):
    """Graphs that compute again at each replay, from the tensors that a replay is given."""

    def _record(self, compute: Any, device: torch.device) -> tuple[Any, torch.Tensor]:
        gradients = [gradient.clone() for gradient in self._gradients]
        result = compute()

        def replay() -> None:
            with torch.enable_grad():
                result.copy_(compute())

        result.zero_()  # to capture computes nothing
        torch._foreach_copy_(self._gradients, gradients)
        return SimpleNamespace(replay=replay), result


PASSES: dict[str, dict[str, Any]] = {
    "dense": {"mode": "dense"},
    "none": {"mode": "dense", "context_backward": "none"},
    "sampled": {"mode": "dense", "context_backward": "sampled"},
    "sampled svd": {"mode": "svd", "svd_rank": 4, "estimator_tokens": 7, "ffn_sparsity": 0.5,
                    "context_backward": "sampled"},
    "fp8": {"mode": "dense", "frozen_precision": "fp8_emulated"},
    "activated LoRA": {"mode": "dense"},
}  # fmt: skip


def unequal_batches() -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Batches of one shape and of others, with the invocation of an activated LoRA; their masks."""
    generator = torch.Generator().manual_seed(5)
    for lengths in ([28, 21, 25], [28, 21, 25], [27, 20, 25], [28, 21, 25], [19, 14, 24], [19, 14, 24], [19, 14, 24]):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(9, 64, mask.shape, generator=generator)
        ids[:, 8:10] = torch.tensor(INVOCATION)
        labels = torch.where((mask == 1) & (mask.cumsum(1) > 12), ids, -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}, mask


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_by_graphs_of_few_shapes_is_the_pass_without(name, monkeypatch):
    monkeypatch.setattr(graphs_module, "_EXCESS_THAT_PAYS", 0.2)
    monkeypatch.setattr(TokenLayout, "to", lambda layout, device: replace(layout, host=layout))
    model = adapted("llama") if name == "activated LoRA" else tiny("llama")
    trained = [p for p in model.parameters() if p.requires_grad]
    handle = sparsify(model, SparsityConfig(**PASSES[name]))
    assert handle._decoder is not None
    handle._decoder.graphs = Rerun(trained)
    before = torch.zeros(())
    for number, (batch, mask) in enumerate(unequal_batches()):
        results = []
        for multiple in (4, 0):
            layout = TokenLayout.build(mask, batch["labels"], multiple=multiple).to("cpu")
            handle.begin_step(number, 100)  # the same rows are drawn
            loss = model(**batch, token_layout=layout).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, trained)])
        assert_equal(results, 1e-7 if name == "fp8" else 1e-12)  # scales are in float32
        graphed = torch.cat([x.flatten() for x in results[0][1:]])
        assert number == 0 or float((graphed - before).norm()) > 0.2 * float(graphed.norm())  # another batch
        before = graphed
    captures, replays = handle.graphs
    assert 2 <= captures < 6 == replays


def test_stand_ins_take_the_gradients_of_a_pass_and_leave_the_parameters_out():
    model, batch = tiny("llama"), ragged("llama")
    trained = [p for p in model.parameters() if p.requires_grad]
    sparsify(model, SparsityConfig(mode="dense"))
    expected = torch.autograd.grad(model(**batch).loss, trained)
    with stand_ins(trained) as leaves:
        loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, [*leaves, *trained], allow_unused=True)
    assert all(a is not None and torch.equal(a, b) for a, b in zip(gradients, expected))
    assert all(gradient is None for gradient in gradients[len(leaves) :])
    outside = torch.autograd.grad(model(**batch).loss, [*leaves, *trained], allow_unused=True)
    assert all(gradient is None for gradient in outside[: len(leaves)])  # the control: they are asked for inside alone


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "dense"},
        {"mode": "dense", "context_backward": "none"},
        {"mode": "dense", "context_backward": "sampled"},
        {"mode": "dense", "frozen_precision": "fp8_emulated"},
        {"mode": "random_fixed", "ffn_sparsity": 0.5},
        {"mode": "random_fixed", "ffn_sparsity": 0.5, "context_backward": "sampled"},
        None,
    ],
    ids=lambda settings: "activated LoRA" if settings is None else str(settings),
)
def test_a_replayed_pass_is_the_uncaptured_one(settings, monkeypatch):
    """Over a first pass, coarse graphs, larger graphs in place of others, and those captured behind a replay."""
    monkeypatch.setattr(graphs_module, "_EXCESS_THAT_PAYS", 0.2)
    model = (adapted("llama") if settings is None else tiny("llama")).float().cuda()
    trained = [p for p in model.parameters() if p.requires_grad]
    handle = sparsify(model, SparsityConfig(**(settings or {"mode": "dense"})))
    before = torch.zeros(())
    for number, (on_host, mask) in enumerate(unequal_batches()):
        results = []
        for multiple in (4, 0):
            layout = TokenLayout.build(mask, on_host["labels"], multiple=multiple).to("cuda")
            batch = {key: value.cuda() for key, value in on_host.items()}
            handle.begin_step(number, 100)  # the same rows are drawn
            loss = model(**batch, token_layout=layout).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, trained)])
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=0)
        graphed, plain = (torch.cat([x.flatten() for x in result[1:]]) for result in results)
        # Sums in another order may round to another number of 3 bits.
        limit = 2e-2 if settings is not None and "frozen_precision" in settings else 1e-3
        assert float((graphed - plain).norm()) < limit * float(plain.norm())
        assert number == 0 or float((graphed - before).norm()) > 0.2 * float(plain.norm())  # the control: another batch
        before = graphed
    captures, replays = handle.graphs
    assert captures >= 2
    assert replays >= 6


def llama_on_gpu(dropout: float = 0.0) -> tuple[Any, list[torch.nn.Parameter], dict[str, torch.Tensor]]:
    model = tiny("llama", dropout=dropout).float().cuda()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, trained, {key: value.cuda() for key, value in ragged("llama").items()}


def gradients_of(model: Any, trained: list[torch.nn.Parameter], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.flatten() for x in torch.autograd.grad(model(**batch).loss, trained)])


@pytest.mark.gpu
def test_a_graph_keeps_the_memory_that_it_reads():
    """Passes in another state of the adapter make other copies of the factors, and the first ones' memory is free."""
    model, trained, batch = llama_on_gpu()
    handle = sparsify(model, SparsityConfig(mode="dense"))
    expected = [gradients_of(model, trained, batch) for _ in range(3)][-1]
    assert handle.graphs[0] == 1
    with torch.autocast("cuda", torch.bfloat16):
        other = gradients_of(model, trained, batch)
    garbage = [torch.full((n,), float("nan"), device="cuda") for n in range(16, 4096, 16)]
    assert torch.equal(gradients_of(model, trained, batch), expected)
    assert handle.graphs[1] >= 2
    assert float((other.float() - expected).norm()) > 1e-3 * float(expected.norm())  # the control: another state
    del garbage


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["o_proj", "up_proj", "input_layernorm", "lm_head"])
def test_frozen_weights_in_other_memory_are_read_there(name):
    model, trained, batch = llama_on_gpu()
    handle = sparsify(model, SparsityConfig(mode="dense"))
    before = [gradients_of(model, trained, batch) for _ in range(3)][-1]
    module = next(module for key, module in model.named_modules() if key.endswith(name))
    weight = getattr(module, "base_layer", module).weight
    weight.data = weight.data * 1.5
    moved = [gradients_of(model, trained, batch) for _ in range(3)]
    handle.forget_graphs()
    torch.testing.assert_close(moved[0], gradients_of(model, trained, batch), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(moved[2], moved[0], rtol=1e-3, atol=1e-5)
    assert float((moved[0] - before).norm()) > 1e-2 * float(before.norm())  # the control: the weight counts


@pytest.mark.gpu
def test_a_capture_does_not_change_the_masks_of_a_replay_that_still_runs(monkeypatch):
    monkeypatch.setattr(graphs_module, "_EXCESS_THAT_PAYS", 0.01)
    capture = GraphedLoss._capture

    def waiting(self: GraphedLoss, *args: Any) -> Any:
        torch.cuda.synchronize()
        return capture(self, *args)

    results = []
    for waits in (False, True):
        monkeypatch.setattr(GraphedLoss, "_capture", waiting if waits else capture)
        model, trained, _ = llama_on_gpu(dropout=0.5)
        handle = sparsify(model, SparsityConfig(mode="dense"))
        torch.cuda.manual_seed(0)
        gradients = []
        busy = torch.randn(4096, 4096, device="cuda")
        for on_host, mask in unequal_batches():
            layout = TokenLayout.build(mask, on_host["labels"], multiple=4).to("cuda")
            batch = {key: value.cuda() for key, value in on_host.items()}
            for _ in range(20):  # the replay waits for these, while the host captures
                busy = torch.mm(busy, busy).clamp_(-1, 1)
            loss = model(**batch, token_layout=layout).loss
            gradients += torch.autograd.grad(loss, trained)
        assert handle.graphs[0] >= 2
        results.append(torch.cat([x.flatten() for x in gradients]))
        handle.remove()
    assert torch.equal(*results)


@pytest.mark.gpu
def test_after_a_capture_that_failed_training_goes_on(monkeypatch):
    model, trained, batch = llama_on_gpu()
    handle = sparsify(model, SparsityConfig(mode="dense"))
    expected = gradients_of(model, trained, batch)
    assert handle._decoder is not None
    summed_loss = handle._decoder._summed_loss

    def reads_a_value(*args: Any) -> torch.Tensor:
        loss = summed_loss(*args)
        loss.item()  # which a capture forbids
        return loss

    monkeypatch.setattr(handle._decoder, "_summed_loss", reads_a_value)
    with pytest.raises(RuntimeError, match="captur"):
        model(**batch)
    monkeypatch.undo()
    for _ in range(2):
        torch.testing.assert_close(gradients_of(model, trained, batch), expected, rtol=1e-3, atol=1e-5)
    assert handle.graphs == (1, 2)


@pytest.mark.gpu
def test_a_pass_whose_tensors_are_saved_on_the_host_is_not_captured():
    model, trained, batch = llama_on_gpu()
    handle = sparsify(model, SparsityConfig(mode="dense"))
    expected = [gradients_of(model, trained, batch) for _ in range(2)][-1]
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradients_of(model, trained, batch), expected, rtol=1e-3, atol=1e-5)
    assert handle.graphs == (1, 1)

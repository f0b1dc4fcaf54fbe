"""Each operation against plain torch in float64: values and every gradient, odd shapes; Triton where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparselora.contextual.estimator import oracle_attention_scores
from sparselora.kernels.activation import gated_activation
from sparselora.kernels.casts import CastTable, factor_gradients
from sparselora.kernels.columns import take_columns
from sparselora.kernels.cross_entropy import linear_cross_entropy
from sparselora.kernels.norm import add_rms_norm
from sparselora.kernels.rows import Channels, Rows
from sparselora.kernels.scores import attention_scores, gated_norms
from sparselora.kernels.select import attention_indices, top_indices
from sparselora.kernels.slots import Rotation, from_slots, to_heads, to_slots
from sparselora.kernels.thin import thin_product
from sparselora.kernels.tops import top_logits

IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=pytest.mark.gpu)]


def setting(impl: str) -> tuple[torch.device, torch.dtype, float]:
    """Device, dtype and tolerance: float64 on the CPU is exact, float32 on the GPU is to rounding."""
    if impl == "torch":
        return torch.device("cpu"), torch.float64, 1e-12
    return torch.device("cuda"), torch.float32, 2e-5


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(ours, theirs, ours_in, theirs_in, tolerance):
    """Values and gradients, ``ours`` from ``ours_in`` on a device, ``theirs`` in float64 from ``theirs_in``."""
    ours, theirs = (x if isinstance(x, (list, tuple)) else [x] for x in (ours, theirs))
    grads = [draw(99 + i, *y.shape) for i, y in enumerate(theirs)]
    a = torch.autograd.grad(ours, ours_in, [g.to(y) for g, y in zip(grads, ours)])
    b = torch.autograd.grad(theirs, theirs_in, grads)
    for x, y in zip([*ours, *a], [*theirs, *b]):
        assert x.shape == y.shape
        assert float((x.detach().cpu().double() - y.detach()).norm()) <= tolerance * max(1.0, float(y.detach().norm()))


def leaves(impl, *values):
    device, dtype, _ = setting(impl)
    return [v.to(device, dtype).requires_grad_() for v in values], [v.clone().requires_grad_() for v in values]


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("d", [7, 96, 130])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_add_rms_norm(impl, d, delta):
    device, dtype, tolerance = setting(impl)
    ours, theirs = leaves(impl, draw(0, 5, d), *([draw(1, 5, d)] if delta else []))
    weight = draw(2, d)
    got = add_rms_norm(ours[0], ours[1] if delta else None, weight.to(device, dtype), 1e-5, impl=impl)
    total = sum(theirs)
    expected = weight * total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
    assert_equal(got, [total * 1, expected], ours, theirs, tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gated_activation(impl):
    ours, theirs = leaves(impl, 3 * draw(0, 7, 33), draw(1, 7, 33))
    got = gated_activation(torch.cat(ours, dim=1), nn.SiLU(), impl=impl)
    assert_equal(got, F.silu(theirs[0]) * theirs[1], ours, theirs, setting(impl)[2])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_linear_cross_entropy(impl, bias, monkeypatch):
    device, dtype, tolerance = setting(impl)
    monkeypatch.setattr("sparselora.kernels.cross_entropy._CHUNK_LOGITS", 3 * 5001)  # several chunks
    ours, theirs = leaves(impl, draw(0, 11, 24))
    weight, b = draw(1, 5001, 24), draw(2, 5001) if bias else None
    targets = torch.randint(5001, (11,), generator=torch.Generator().manual_seed(3))
    targets[[2, 7]] = -100  # rows that do not count
    got = linear_cross_entropy(
        ours[0], weight.to(device, dtype), None if b is None else b.to(device, dtype), targets.to(device), impl=impl
    )
    expected = F.cross_entropy(F.linear(theirs[0], weight, b), targets, reduction="sum")
    assert_equal(got, expected, ours, theirs, tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_take_columns(impl):
    device, dtype, _ = setting(impl)
    W, index = draw(0, 13, 300).to(device, dtype), torch.tensor([0, 3, 17, 255, 299], device=device)
    torch.testing.assert_close(take_columns(W, index, impl=impl), W[:, index], rtol=0, atol=0)


@pytest.mark.parametrize("n", [5, 300, 14336])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_top_indices(impl, n):
    device, dtype, _ = setting(impl)
    for seed, count in ((0, 1), (1, n // 3 + 1), (2, n - 1), (3, n)):
        scores = (3 * draw(seed, n)).round() if seed % 2 else draw(seed, n)  # rounded: many ties, some negative
        expected = sorted(sorted(range(n), key=lambda i: (-float(scores[i]), i))[:count])
        assert top_indices(scores.to(device, dtype), count, impl=impl).tolist() == expected


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "pairs"), [(4, 2, 8, True), (6, 2, 10, True), (4, 4, 6, False)]
)
def test_attention_indices(heads, kv_heads, head_dim, pairs):
    width, group, half = kv_heads * head_dim, heads // kv_heads, head_dim // 2
    qk, v = draw(0, width).cuda().float().abs(), draw(1, width).cuda().float().abs()
    kept = 2 * (width // 6), width // 3 + 1
    unit = [{c} for c in range(width)]
    if pairs:
        unit = [{g * head_dim + d, g * head_dim + d + half} for g in range(kv_heads) for d in range(half)]
    best = sorted(unit, key=lambda each: -sum(float(qk[c]) for c in each))[: kept[0] // len(unit[0])]
    k = sorted(set().union(*best))
    values = sorted(v.argsort(descending=True)[: kept[1]].tolist())

    def queries(channels):
        return [h * head_dim + c % head_dim for h in range(heads) for c in channels if c // head_dim == h // group]

    total = heads * head_dim
    expected = queries(k) + [total + c for c in k] + [total + width + c for c in values]
    index, inverse, o, o_inverse = attention_indices(qk, v, kept, heads, kv_heads, head_dim, pairs)
    for got, wanted, all_ in ((index, expected, total + 2 * width), (o, queries(values), total)):
        assert got.tolist() == wanted
        places = (inverse if got is index else o_inverse).tolist()
        assert places == [wanted.index(c) if c in wanted else -1 for c in range(all_)]


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_gated_norms(bias):
    z, up, gate = draw(0, 137, 10), draw(1, 75, 5), draw(2, 75, 5)
    biases = [draw(3 + i, 75) for i in range(2)] if bias else [None, None]
    u, g = F.linear(z[:, :5], up, biases[0]), F.linear(z[:, 5:], gate, biases[1])
    there = [None if t is None else t.cuda().float() for t in (z, up, gate, *biases)]
    got = gated_norms(*there[:3], act=nn.SiLU(), up_bias=there[3], gate_bias=there[4])
    torch.testing.assert_close(got.double().cpu(), (F.silu(g) * u).norm(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_attention_scores(impl, rope):
    device, dtype, tolerance = setting(impl)
    heads, kv_heads, head_dim = 4, 2, 6
    z, rows = draw(0, 45, 9), draw(1, (heads + 2 * kv_heads) * head_dim, 10)
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rope": rope}
    q, k, v = F.linear(z, rows[:, :9], rows[:, 9]).split([heads * head_dim, *[kv_heads * head_dim] * 2], dim=1)
    got = attention_scores(z.to(device, dtype), rows.to(device, dtype), **shape, impl=impl)
    for ours, theirs in zip(got, oracle_attention_scores(q, k, v, **shape)):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("ranks", [(5,), (100,), (5, 40)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_thin_product(impl, ranks):
    device, dtype, tolerance = setting(impl)
    terms = [(draw(i, 70, r + 2)[:, 1 : r + 1], draw(9 + i, 130, r).t()) for i, r in enumerate(ranks)]
    bias = draw(5, 130)
    expected = sum(z @ C for z, C in terms)
    there = [(z.to(device, dtype), C.to(device, dtype)) for z, C in terms]
    for b in (None, bias):
        wide = torch.full((70, 140), 7.0, dtype=dtype, device=device)
        thin_product(there, wide[:, :130], None if b is None else b.to(device, dtype), impl=impl)
        wanted = expected if b is None else expected + b
        assert float((wide[:, :130].double().cpu() - wanted).norm()) <= tolerance * float(wanted.norm())
        assert bool((wide[:, 130:] == 7).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_casts_and_gradients_of_factors(impl):
    device, dtype, _ = setting(impl)
    sources = [draw(0, 3, 700).to(device, dtype), draw(1, 11, 3).to(device, dtype)]
    targets = [torch.zeros(3, 700, device=device), torch.zeros(11, 8, device=device)[:, 2:5]]
    CastTable(sources, targets, [1.0, 2.5]).run()
    torch.testing.assert_close(targets[0], sources[0].float())
    torch.testing.assert_close(targets[1], (2.5 * sources[1]).float())
    dA, dB = draw(2, 5, 37).to(device, dtype), draw(3, 41, 9).to(device, dtype)
    A, B = factor_gradients(dA, dB[:, 2:7], 2.5, dtype, impl=impl)
    torch.testing.assert_close(A, dA, rtol=0, atol=0)
    torch.testing.assert_close(B, 2.5 * dB[:, 2:7])
    assert A.is_contiguous()
    assert B.is_contiguous()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE by its definition: a plane rotation of channels d and d + D/2 of each head, one at a time."""
    n, width = x.shape
    head = cos.shape[1]
    out = [[None] * width for _ in range(n)]
    for t in range(n):
        for c in range(width):
            d = c % head
            partner = c + head // 2 if d < head // 2 else c - head // 2
            out[t][c] = x[t, c] * cos[t, d] + (-1 if d < head // 2 else 1) * x[t, partner] * sin[t, d]
    return torch.stack([torch.stack(row) for row in out])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_slots_and_back(impl):
    device, _, tolerance = setting(impl)
    width = 18
    index = torch.tensor([0, 3, 4, 7, 10, 17])
    slots = torch.tensor([9, 2, 0, 5, 7, 1, 3])
    pieces = [Rows(0, 4, Channels.of(index.to(device), width)), Rows(4, 7)]
    ours, theirs = leaves(impl, draw(0, 4, 6), draw(1, 3, width))
    full = to_slots(list(zip(pieces, ours)), slots.to(device), (11, width), impl=impl)
    wide = torch.zeros(4, width, dtype=torch.float64).index_copy(1, index, theirs[0])
    expected = torch.zeros(11, width, dtype=torch.float64).index_copy(0, slots, torch.cat((wide, theirs[1])))
    assert_equal(full, expected, ours, theirs, tolerance)

    ours, theirs = leaves(impl, draw(2, 11, width))
    got = from_slots(ours[0], pieces, slots.to(device), impl=impl)
    rows = theirs[0][slots]
    assert_equal(got, [rows[:4][:, index], rows[4:]], ours, theirs, tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_heads_are_rotated_and_split(impl):
    device, dtype, tolerance = setting(impl)
    head, widths, n = 6, (12, 6, 6), 7
    total = sum(widths)
    index = torch.tensor([0, 3, 4, 7, 11, 13, 16, 19, 23])  # 4 lacks its partner: it counts as zero
    slots = torch.tensor([9, 2, 0, 5, 7, 1, 3])
    cos, sin = draw(5, n, head), draw(6, n, head)
    ours, theirs = leaves(impl, draw(0, 4, len(index)), draw(1, 3, total))
    rotation = Rotation(cos.to(device, dtype), sin.to(device, dtype))
    pieces = [Rows(0, 4, Channels.of(index.to(device), total)), Rows(4, 7)]
    got = to_heads(list(zip(pieces, ours)), slots.to(device), 11, widths, rotation, impl=impl)
    wide = torch.zeros(4, total, dtype=torch.float64).index_copy(1, index, theirs[0])
    packed = torch.cat((wide, theirs[1]))
    packed = torch.cat((rotate(packed[:, :18], cos, sin), packed[:, 18:]), dim=1)
    expected = torch.zeros(11, total, dtype=torch.float64).index_copy(0, slots, packed)
    assert_equal(got, expected.split(widths, dim=1), ours, theirs, tolerance)


@pytest.mark.parametrize(
    ("V", "k"), [(1, 1), (7, 7), (50, 3), (1000, 64), (1003, 5), (1024, 1), (997, 900), (4099, 64), (70001, 64)]
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_top_logits(impl, V, k):
    device, dtype, tolerance = setting(impl)
    rows = torch.tensor([4, 0, 3])
    logits = draw(0, 5, V)
    tied = logits.round()  # ties, and columns that are ruled out
    tied[:, ::3] = -torch.inf
    for exact in (logits, tied):
        given = exact.to(device, dtype)
        for some in (None, rows):
            meant = given if some is None else given[rows.to(device)]
            values, index, lse = top_logits(given, k, None if some is None else some.to(device), impl=impl)
            assert torch.equal(values.sort(descending=True).values, meant.topk(k).values)
            assert torch.equal(meant.gather(1, index), values)
            assert all(len(set(row.tolist())) == k for row in index)
            expected = (exact if some is None else exact[rows]).logsumexp(dim=1)
            torch.testing.assert_close(lse.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["dense", "svd", "static", "surrogate", "skip"])
def test_a_captured_pass_equals_the_same_pass_run_directly(mode, tmp_path):
    import transformers as tf

    from sparselora.bench.timing import adapt
    from sparselora.config.sparsity import SparsityConfig
    from sparselora.contextual.handle import sparsify
    from tests.helpers.contextual_models import SIZES

    torch.manual_seed(0)
    wide = SIZES | {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": 256}
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**wide, num_key_value_heads=2)).to("cuda", torch.bfloat16)
    model = adapt(base, r=4, alpha=8, targets=None, causal=True)
    layers = {} if mode == "dense" else {"layer.0": 0.5, "layer.1": 0.75}
    if mode in ("svd", "static", "surrogate"):
        layers["layer.1.attention"] = 0.5
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):  # ragged, several rows of the same padded shape
        ids = torch.randint(64, (4, 90), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        for row in range(4):
            n = int(torch.randint(70, 91, (1,), generator=generator))
            mask[row, n:], labels[row, n:], labels[row, :40] = 0, -100, -100
        batches.append({"input_ids": ids.cuda(), "attention_mask": mask.cuda(), "labels": labels.cuda()})
    config = SparsityConfig(mode=mode, svd_rank=4, surrogate_rank=4, layer_sparsity=layers)
    handle = sparsify(model, config, calibration=batches[:1], cache_dir=tmp_path)
    parameters = [p for p in model.parameters() if p.requires_grad]
    graphs, handle._decoder.graphs = handle._decoder.graphs, None

    def step(batch):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        return loss.detach(), torch.autograd.grad(loss, parameters)

    direct = [step(batch) for batch in batches]
    handle._decoder.graphs = graphs
    step(batches[0]), step(batches[0])
    replayed = [step(batch) for batch in batches]
    assert handle.graphs[0] >= 1
    assert handle.graphs[1] >= 3
    for (loss, grads), (expected, expected_grads) in zip(replayed, direct):
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-3)
        ours, theirs = (torch.cat([g.flatten() for g in each]) for each in (grads, expected_grads))
        assert float((ours - theirs).norm() / theirs.norm()) < (0.5 if mode == "svd" else 0.05)
    handle.hold_choices()  # forgets the graphs: what they compute with may have changed
    captured = handle.graphs[0]
    for _ in range(3):
        torch.testing.assert_close(step(batches[2])[0], replayed[2][0], rtol=2e-2, atol=1e-3)
    assert handle.graphs[0] == captured + 1

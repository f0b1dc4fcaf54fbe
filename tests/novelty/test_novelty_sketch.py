"""Sketches against brute force, autograd and another library; Frequent Directions against its two bounds."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparselora.errors import InputError
from sparselora.novelty import CountSketch, FrequentDirections, TensorSketch, align_causal
from sparselora.novelty import sketch as sketch_module


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def sketched_matrix(sketch: TensorSketch, G: torch.Tensor) -> torch.Tensor:
    """The definition: entry (j, i) of the gradient ``G (V, d)`` goes to bucket h(i) + h'(j) mod m with both signs."""
    G = G.detach().double()
    buckets = (sketch.vocab.buckets[:, None] + sketch.hidden.buckets) % sketch.m
    signed = G * sketch.vocab.signs.double()[:, None] * sketch.hidden.signs.double()
    return torch.zeros(sketch.m, dtype=torch.float64).index_add_(0, buckets.flatten(), signed.flatten())


# --- CountSketch and TensorSketch over their hashes ----------------------------------------------------------------


def test_count_sketch_is_unbiased_with_the_stated_variance():
    n, m, draws = 10, 8, 8000
    x, y = normal(n), normal(n, seed=1)
    x[0] = y[0] = 2.0  # one heavy coordinate, so that each term of the variance counts
    rng = np.random.default_rng(0)
    got = np.empty(draws)
    for i in range(draws):
        a, b = CountSketch(n, m, rng).dense(torch.stack([x, y]))
        got[i] = a @ b
    product, squares = float(x @ y), float((x * y).square().sum())
    variance = (float(x.square().sum() * y.square().sum()) + product**2 - 2 * squares) / m
    assert abs(got.mean() - product) < 4 * math.sqrt(variance / draws)
    assert got.var() == pytest.approx(variance, rel=0.06)
    # The control: the formula without its last term, that of a Gaussian projection, is another one.
    assert got.var() != pytest.approx(variance + 2 * squares / m, rel=0.2)


def test_count_sketch_of_entries_is_that_of_the_row():
    index, values = integers(9, 4, 6), normal(4, 6)
    rows = torch.zeros(4, 9, dtype=torch.float64).scatter_add_(1, index, values)  # an index may occur twice
    sketch = CountSketch(9, 8, np.random.default_rng(1))
    torch.testing.assert_close(sketch.sparse(index, values), sketch.dense(rows))


def test_tensor_sketch_is_unbiased():
    d, V, m, draws = 5, 6, 16, 4000
    batches = [(normal(3, d, seed=s), normal(3, V, seed=s + 10), integers(V, 3, seed=s)) for s in (0, 1)]
    batches[1] = (batches[0][0] + 0.5 * batches[1][0], batches[0][1], batches[0][2])  # related, so the product is not 0
    G = [(torch.softmax(logits, 1) - F.one_hot(y, V)).T @ h for h, logits, y in batches]
    got = np.empty(draws)
    for seed in range(draws):
        sketch = TensorSketch(d, V, m, seed=seed)
        a, b = (sketch.head_gradient(*batch) for batch in batches)
        got[seed] = a @ b
    product = float((G[0] * G[1]).sum())
    error = got.std() / math.sqrt(draws)
    assert abs(got.mean() - product) < 4 * error
    assert 20 * error < product  # so a factor of 1/m, 1/√m or 2 would not pass


@pytest.mark.parametrize("seed", range(3))
def test_hashes_are_the_seeds_and_the_pairs_differ(seed):
    one, same, other = (TensorSketch(300, 300, 64, seed=s) for s in (seed, seed, seed + 1))
    for pair in ("hidden", "vocab"):
        assert torch.equal(getattr(one, pair).buckets, getattr(same, pair).buckets)
        assert torch.equal(getattr(one, pair).signs, getattr(same, pair).signs)
        assert (getattr(one, pair).buckets == getattr(other, pair).buckets).double().mean() < 0.1
    assert (one.hidden.buckets == one.vocab.buckets).double().mean() < 0.1
    assert (one.hidden.signs == one.vocab.signs).double().mean() < 0.7


def test_agrees_with_another_librarys_tensor_sketch():
    """Both as the transform of the same hashes, exactly, and as an estimate of ⟨x, y⟩² with their own."""
    from sklearn.kernel_approximation import PolynomialCountSketch

    n, m = 12, 32
    logits, targets = normal(1, n), torch.tensor([3])
    e = torch.softmax(logits, 1) - F.one_hot(targets, n)
    theirs = PolynomialCountSketch(degree=2, n_components=m, random_state=0).fit(e.numpy())
    sketch = TensorSketch(n, n, m)
    for i, pair in enumerate((sketch.hidden, sketch.vocab)):
        pair.buckets = torch.from_numpy(theirs.indexHash_[i]).long()
        pair.signs = torch.from_numpy(theirs.bitHash_[i]).float()
    got = sketch.head_gradient(e, logits, targets)
    np.testing.assert_allclose(got, theirs.transform(e.numpy())[0], atol=1e-12)
    ours, peers = [], []
    for seed in range(600):
        ours.append(float(TensorSketch(n, n, m, seed=seed).head_gradient(e, logits, targets).square().sum()))
        peer = PolynomialCountSketch(degree=2, n_components=m, random_state=seed).fit_transform(e.numpy())
        peers.append(float(np.square(peer).sum()))
    assert np.mean(ours) == pytest.approx(np.mean(peers), abs=4 * (np.std(ours) + np.std(peers)) / math.sqrt(600))
    assert np.std(ours) == pytest.approx(np.std(peers), rel=0.3)


# --- the head gradient ---------------------------------------------------------------------------------------------


class Head(nn.Module):
    """A causal model of an embedding, one mixing layer and a head: enough for a gradient in the head's weight."""

    def __init__(self, vocab: int = 23, d: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.embedding = nn.Parameter(torch.randn(vocab, d, generator=generator, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(vocab, d, generator=generator, dtype=torch.float64))

    def forward(self, ids):
        h = torch.tanh(self.embedding[ids].cumsum(dim=1))
        return h, h @ self.head.T


@pytest.fixture
def causal():
    """A batch ``(3, 7)`` with masked labels, and the head's gradient by autograd of the usual causal loss."""
    model, ids = Head(), integers(23, 3, 7, seed=3)
    labels = ids.clone()
    labels[0, :4] = labels[2, 5:] = -100
    h, logits = model(ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
    return h, logits, labels, model.head.grad


def test_equals_the_sketch_of_autograds_gradient_exactly(causal):
    h, logits, labels, G = causal
    for m in (8, 64):
        sketch = TensorSketch(6, 23, m)
        got = sketch.head_gradient(*align_causal(h, logits, labels))
        assert got.dtype == torch.float64
        assert not got.requires_grad
        torch.testing.assert_close(got, sketched_matrix(sketch, G), rtol=1e-10, atol=1e-10)


def test_in_single_precision_and_with_the_largest_logits_the_direction_stays(causal):
    h, logits, labels, G = causal
    sketch = TensorSketch(6, 23, 4096)
    half = sketch.head_gradient(*align_causal(h.bfloat16(), logits.bfloat16(), labels))
    assert half.dtype == torch.float32
    assert cosine(half, sketched_matrix(sketch, G)) > 0.99
    cut = TensorSketch(6, 23, 4096, top_k=8)
    assert cosine(cut.head_gradient(*align_causal(h, logits, labels)), sketched_matrix(sketch, G)) > 0.99
    # And the sketch stands for the gradient itself: cosines between batches survive.
    other = G + 0.7 * G.norm() / math.sqrt(G.numel()) * normal(*G.shape, seed=8)
    pair = [sketched_matrix(sketch, x) for x in (G, other)]
    assert cosine(*pair) == pytest.approx(cosine(G.flatten(), other.flatten()), abs=0.1)


def test_labels_are_shifted_by_one(causal):
    h, logits, labels, G = causal
    sketch = TensorSketch(6, 23, 256)
    truth = sketched_matrix(sketch, G)
    flat_h, flat_logits, targets = align_causal(h, logits, labels)
    assert flat_logits.data_ptr() == logits.data_ptr()  # a view
    assert targets.view(3, 7)[:, :-1].equal(labels[:, 1:])
    assert (targets.view(3, 7)[:, -1] == -100).all()
    assert cosine(sketch.head_gradient(flat_h, flat_logits, targets), truth) > 0.999
    # The trap: each position held against its own label.
    assert cosine(sketch.head_gradient(flat_h, flat_logits, labels.flatten()), truth) < 0.9
    one = align_causal(h[0], logits[0], labels[0])
    assert [tuple(x.shape) for x in one] == [(7, 6), (7, 23), (7,)]
    with pytest.raises(InputError, match=r"\(3, 7, 6\).*\(3, 6\)"):
        align_causal(h, logits, labels[:, 1:])


@pytest.mark.parametrize("k", [1, 3, 12])
def test_the_kept_logits_and_the_target_are_a_set(k):
    """The oracle builds e entry by entry from the full softmax; targets inside and outside of the top k."""
    T, V, d = 6, 12, 4
    h, logits = normal(T, d), 2 * normal(T, V, seed=1)
    order = logits.argsort(dim=1, descending=True)
    targets = torch.cat([order[:3, 0], order[3:, -1]])
    p = torch.softmax(logits, dim=1)
    e = torch.zeros(T, V, dtype=torch.float64)
    for t in range(T):
        for j in {*order[t, :k].tolist(), int(targets[t])}:
            e[t, j] = p[t, j] - float(j == int(targets[t]))
    sketch = TensorSketch(d, V, 128, top_k=k)
    got = sketch.head_gradient(h, logits, targets)
    torch.testing.assert_close(got, sketched_matrix(sketch, e.T @ h), rtol=1e-10, atol=1e-10)
    # The trap: a target among the top k is counted twice.
    e[torch.arange(3), targets[:3]] += p[torch.arange(3), targets[:3]]
    assert not torch.allclose(got, sketched_matrix(sketch, e.T @ h), atol=1e-3)


def test_ignored_tokens_have_no_part_whatever_they_hold():
    h, logits, targets = normal(5, 4), normal(5, 9, seed=1), integers(9, 5)
    sketch = TensorSketch(4, 9, 32, top_k=3)
    alone = sketch.head_gradient(h[1:3], logits[1:3], targets[1:3])
    targets[[0, 3, 4]] = -100
    h[0], logits[3] = math.nan, math.inf
    torch.testing.assert_close(sketch.head_gradient(h, logits, targets), alone)
    # On a GPU their number is not known, and they are weighted with zero.
    masked = sketch.accumulate()
    masked._add(h, logits, targets, None)
    torch.testing.assert_close(masked.value(), alone)
    nothing = sketch.head_gradient(h, logits, torch.full_like(targets, -100))
    assert torch.equal(nothing, torch.zeros(32))
    # The control: a labelled token that is not finite is not hidden.
    targets[0] = 1
    assert sketch.head_gradient(h, logits, targets).isnan().all()


def test_parts_add_up(monkeypatch):
    h, logits, targets = normal(50, 4), normal(50, 30, seed=1), integers(30, 50)
    targets[::3] = -100
    sketch = TensorSketch(4, 30, 64, top_k=5)
    whole = sketch.head_gradient(h, logits, targets)
    monkeypatch.setitem(sketch_module._CHUNK_LOGITS, "cpu", 7 * 30)
    torch.testing.assert_close(sketch.head_gradient(h, logits, targets), whole)
    total = sketch.accumulate()
    for part in (slice(0, 11), slice(11, 12), slice(12, 50)):
        total.add(h[part], logits[part], targets[part])
    torch.testing.assert_close(total.value(), whole)
    separate = [sketch.head_gradient(h[part], logits[part], targets[part]) for part in (slice(0, 20), slice(20, 50))]
    torch.testing.assert_close(sum(separate), whole)


def test_a_classification_head_is_the_same_without_a_shift():
    pooled, weight, labels = normal(8, 5), normal(3, 5, seed=1).requires_grad_(), integers(3, 8)
    logits = pooled @ weight.T
    F.cross_entropy(logits, labels, reduction="sum").backward()
    sketch = TensorSketch(5, 3, 16, top_k=3)
    got = sketch.head_gradient(pooled, logits, labels)
    torch.testing.assert_close(got, sketched_matrix(sketch, weight.grad), rtol=1e-10, atol=1e-10)


def test_autocast_and_half_precision_inputs_do_not_round_the_sketch():
    h, logits, targets = normal(9, 16, dtype=torch.bfloat16), normal(9, 40, dtype=torch.bfloat16), integers(40, 9)
    sketch = TensorSketch(16, 40, 32, top_k=8)
    exact = sketch.head_gradient(h.float(), logits.float(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sketch.head_gradient(h, logits, targets), exact)
        assert (h.float() @ h.float().T).dtype == torch.bfloat16  # the control: autocast is on


class Largest(TorchDispatchMode):
    """The most elements that a new tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self.elements = max(self.elements, x.numel())
        return out


def test_no_second_array_of_all_logits(monkeypatch):
    T, V = 64, 1000
    monkeypatch.setitem(sketch_module._CHUNK_LOGITS, "cpu", 4 * V)
    h, logits, labels = normal(2, T // 2, 8), normal(2, T // 2, V), integers(V, 2, T // 2)
    sketch = TensorSketch(8, V, 16, top_k=20)
    with Largest() as seen:
        sketch.head_gradient(*align_causal(h, logits, labels))
    assert seen.elements <= 4 * V
    with Largest() as seen:  # the control
        torch.softmax(logits, dim=-1)
    assert seen.elements == T * V


def a_gate(device):
    """A gate, and the arguments of its embed."""
    from sparselora.novelty import HeadGradientGate

    gate = HeadGradientGate(8, 40, m=16, k=4, k_topk=5, reorth_every=4, device=device)
    h, logits = torch.ones(2, 6, 8, device=device), torch.ones(2, 6, 40, device=device)
    return gate, (h, logits, torch.ones(2, 6, dtype=torch.long, device=device))


def test_nothing_is_read_back_from_the_device(monkeypatch):
    """Tensors without values: every read raises, and so does a shape that depends on values."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know this device
    gate, batch = a_gate("meta")
    z = gate.embed(*batch)
    nov = gate.novelty(z)
    for _ in range(9):
        gate.update(z)
    assert nov.shape == gate.subspace.directions.shape == ()
    # The controls: the one read of a decision, and what is forbidden.
    with pytest.raises(NotImplementedError, match="no data"):
        gate.accept(nov)
    with pytest.raises(NotImplementedError, match="nonzero"):
        z[z > 0]


@pytest.mark.gpu
def test_on_a_gpu_there_is_one_synchronisation_and_the_same_sketch():
    gate, (h, logits, labels) = a_gate("cuda")
    for _ in range(2):
        gate.update(gate.embed(h, logits, labels))
    here = labels.cpu()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gate.embed(h, logits, here)
        z = gate.embed(h, logits, labels)
        gate.update(z)  # the third: no rotation is due
        nov = gate.novelty(z)
        with pytest.raises(RuntimeError, match="synchroniz"):
            gate.accept(nov)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    h, logits, targets = normal(300, 64), normal(300, 5000, seed=1), integers(5000, 300)
    targets[::4] = -100
    on = [TensorSketch(64, 5000, 512, top_k=64, device=device) for device in ("cpu", "cuda")]
    there = [x.cuda() for x in (h, logits, targets)]
    expected = on[0].head_gradient(h, logits, targets)
    torch.testing.assert_close(on[1].head_gradient(*there).cpu(), expected)
    torch.testing.assert_close(on[1].head_gradient(*there[:2], targets).cpu(), expected)
    with pytest.raises(InputError, match=r"hidden are on cpu, the sketch is on cuda:0"):
        on[1].head_gradient(h, *there[1:])


# --- Frequent Directions -------------------------------------------------------------------------------------------


def fed(A: torch.Tensor, k: int, **options: int) -> FrequentDirections:
    directions = FrequentDirections(A.shape[1], k, **options)
    for row in A:
        directions.update(row)
    return directions


@st.composite
def streams(draw):
    """Rows ``(n, m)``: of full or low rank, repeated, of very unequal lengths, or with zeros among them."""
    m, k = draw(st.sampled_from([(8, 1), (8, 3), (12, 5), (6, 5)]))
    n, seed = draw(st.integers(1, 90)), draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    rank = draw(st.integers(1, m))
    A = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, m))
    for kind in draw(st.sets(st.sampled_from(["repeated", "unequal", "zeros", "axes", "decaying"]))):
        if kind == "repeated":
            A = A[rng.integers(0, max(1, n // 10), n)]
        elif kind == "unequal":
            A = A * 10.0 ** rng.integers(-3, 3, (n, 1))
        elif kind == "zeros":
            A = A * (rng.random((n, 1)) < 0.5)
        elif kind == "axes":
            A = np.eye(m)[rng.integers(0, m, n)]
        else:
            A = A * 0.6 ** np.arange(m)
    return torch.from_numpy(A.astype(np.float32)), k, draw(st.sampled_from([1, 2, 7, 30, 200]))


@settings(max_examples=150, deadline=None)
@given(streams())
def test_frequent_directions_keeps_its_bounds(stream):
    A, k, rotate_every = stream
    found = fed(A, k, rotate_every=rotate_every)
    A, B, length = A.double(), found.rows.double(), 2 * k
    rounding = 1e-5 * float(A.square().sum()) + 1e-30
    shrinkage = float(found.shrinkage)
    gap = torch.linalg.eigvalsh(A.T @ A - B.T @ B)
    assert gap[0] >= -rounding
    assert gap[-1] <= shrinkage + rounding
    energies = torch.linalg.svdvals(A).square()
    for j in range(min(length, len(energies) + 1)):
        assert shrinkage <= float(energies[j:].sum()) / (length - j) + rounding
    assert len(B) <= 2 * k - 1 + rotate_every
    # The basis: orthonormal, zero where there is no direction, and never more directions than the stream has.
    found.rotate()
    count = int(found.directions)
    assert count <= int(torch.linalg.matrix_rank(A, rtol=1e-6))
    gram = found.basis.double() @ found.basis.double().T
    torch.testing.assert_close(gram, torch.diag((torch.arange(k) < count).double()), atol=1e-4, rtol=0)
    own = (A @ found.basis.double().T).square().sum(dim=0)  # ‖A v‖²
    assert (found.energies.double() <= own + rounding).all()
    assert (found.energies[:count].double() >= own[:count] - float(found.shrinkage) - rounding).all()


def test_the_bounds_are_not_slack():
    """The control: B really loses a good part of Σδ, so a smaller Σδ would break the upper bound."""
    A = normal(200, 16)
    found = fed(A, 3, rotate_every=4)
    assert float(found.shrinkage) > 1
    gap = torch.linalg.eigvalsh(A.T @ A - found.rows.double().T @ found.rows.double())
    assert gap[-1] > 0.3 * float(found.shrinkage)


def test_few_rows_are_kept_without_loss():
    A = normal(30, 40, dtype=torch.float32)
    for rotate_every in (1, 5, 100):
        found = fed(A, 16, rotate_every=rotate_every)
        assert float(found.shrinkage) == 0
        torch.testing.assert_close(found.rows.T @ found.rows, A.T @ A, atol=1e-3, rtol=1e-4)


def test_the_leading_subspace_of_a_long_stream_is_found():
    m, k = 64, 4
    V = torch.linalg.qr(normal(m, k))[0]
    A = (normal(3000, k, seed=1) * torch.tensor([6.0, 5.0, 4.0, 3.0])) @ V.T + 0.5 * normal(3000, m, seed=2)
    found = fed(A.float(), k, rotate_every=16)
    assert float((found.basis.double() @ V).square().sum()) > 0.99 * k
    # The control: the same number of rows of the stream span much less of it.
    sampled = torch.linalg.qr(A[:k].T)[0]
    assert float((sampled.T @ V).square().sum()) < 0.9 * k


def unseen(basis: torch.Tensor, x: torch.Tensor) -> float:
    return 1 - float((basis.double() @ (x / x.norm()).double()).square().sum())


def test_copies_of_one_vector_are_one_direction():
    m, k = 512, 64
    row, other = normal(m, dtype=torch.float32), normal(m, seed=1)
    found = fed(row.repeat(k, 1) * torch.linspace(0.1, 3, k)[:, None], k, rotate_every=k)
    assert int(found.directions) == 1
    assert unseen(found.basis, other) == pytest.approx(0.998, abs=0.004)
    assert unseen(found.basis, row) == pytest.approx(0, abs=1e-6)
    # The control: orthonormalising the copies without their energies fills the basis with rounding.
    noise = torch.linalg.qr((row.repeat(k, 1) + 1e-6 * normal(k, m, seed=2)).T.double())[0]
    assert unseen(noise.T, other) == pytest.approx(0.875, abs=0.04)


def test_a_young_basis_is_renewed_at_powers_of_two_then_periodically():
    found, seen = FrequentDirections(64, 20, rotate_every=12), []
    for i, row in enumerate(normal(40, 64, dtype=torch.float32), 1):
        before = found.basis
        found.update(row)
        if not torch.equal(before, found.basis):
            seen.append(i)
    assert seen == [1, 2, 4, 8, 12, 24, 36]


def test_the_state_of_the_stream_continues_where_it_was():
    A = normal(100, 16, dtype=torch.float32)
    whole = fed(A, 3, rotate_every=7)
    first = fed(A[:45], 3, rotate_every=7)
    state = first.state_dict()
    first.update(A[0])  # the state is a copy
    second = FrequentDirections(16, 3, rotate_every=7)
    second.load_state_dict(state)
    for row in A[45:]:
        second.update(row)
    for name in ("basis", "energies", "directions", "shrinkage", "rows"):
        assert torch.equal(getattr(whole, name), getattr(second, name)), name
    with pytest.raises(InputError, match=r"k=3, m=16, reorth_every=7, this one k=4"):
        FrequentDirections(16, 4, rotate_every=7).load_state_dict(state)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 500}, r"power of two.*500; 512"),
        ({"m": 1}, "power of two"),
        ({"top_k": 31}, r"1 and the vocabulary's 30, got 31"),
        ({"top_k": 0}, "got 0"),
        ({"vocab_size": 1}, "no softmax"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_sketches_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        TensorSketch(**{"d_hidden": 4, "vocab_size": 30, **options})


def test_rows_that_do_not_fit_are_refused():
    sketch = TensorSketch(4, 30, 16)
    h, logits, targets = normal(5, 4), normal(5, 30), integers(30, 5)
    for bad in ((h[:4], logits, targets), (h, logits[:, :29], targets), (h, logits, targets[None])):
        with pytest.raises(InputError, match=r"must be \(T, 4\), \(T, 30\) and \(T,\)"):
            sketch.head_gradient(*bad)


@pytest.mark.parametrize(
    ("k", "rotate_every", "message"), [(16, 1, "below the sketch"), (0, 1, "got 0"), (2, 0, "reorth")]
)
def test_bad_bases_are_refused(k, rotate_every, message):
    with pytest.raises(InputError, match=message):
        FrequentDirections(16, k, rotate_every=rotate_every)
    with pytest.raises(InputError, match=r"shape \(16,\)"):
        FrequentDirections(16, 2).update(torch.zeros(8))

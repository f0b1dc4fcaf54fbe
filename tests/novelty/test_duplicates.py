"""Near-duplicate rows: planted ones against plain rows, and every decision against brute force over counters."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sparselora.novelty.duplicates import near_duplicates


def random_rows(n: int, seed: int = 0, words: int = 500) -> list[list[int]]:
    """Rows of 20 to 60 tokens, common ones more often."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, words + 1)
    return [rng.choice(words, size=rng.integers(20, 60), p=frequency / frequency.sum()).tolist() for _ in range(n)]


def planted(n: int = 300, copies: int = 60, edits: int = 1, template: int = 0) -> tuple[list[list[int]], set[int]]:
    """Rows in random order, of which ``copies`` are others with ``edits`` tokens replaced, each behind its original."""
    rng = np.random.default_rng(5)
    rows = random_rows(n)
    kept_rows = [(row, False) for row in rows]
    for original in sorted(rng.permutation(n)[:copies].tolist(), reverse=True):
        copy = list(rows[original])
        for place in rng.permutation(len(copy))[:edits]:
            copy[place] = 1000 + int(rng.integers(50))
        kept_rows.insert(int(rng.integers(original + 1, len(kept_rows) + 1)), (copy, True))
    head = list(range(2000, 2000 + template))
    return [head + row for row, _ in kept_rows], {i for i, (_, is_copy) in enumerate(kept_rows) if is_copy}


def cosine(first: list[int], second: list[int]) -> float:
    """By counters, without any sketch."""
    a, b = (Counter(zip(row, row[1:], row[2:])) for row in (first, second))
    dot = sum(count * b[triple] for triple, count in a.items())
    return dot / np.sqrt(sum(c * c for c in a.values()) * sum(c * c for c in b.values()))


@pytest.mark.parametrize("template", [0, 80])
@pytest.mark.parametrize("edits", [0, 1])
def test_planted_copies_are_found_and_nothing_else(edits, template):
    rows, copies = planted(edits=edits, template=template)
    duplicates = near_duplicates(rows, 0.8)
    found_copies = set(duplicates["place"])
    assert len(found_copies & copies) >= 0.95 * len(copies)  # recall
    assert found_copies <= copies  # precision
    assert (duplicates["duplicate_of"] < duplicates["place"]).all()
    assert not set(duplicates["duplicate_of"]) & found_copies, "the row that is referred to stays"


def test_plain_rows_stay():
    assert near_duplicates(random_rows(1500), 0.8).empty
    assert len(near_duplicates(random_rows(1500), 0.02)) > 100, "the control: a low threshold finds many"


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.9, 1.0])
def test_every_decision_is_that_of_brute_force(similarity):
    rng = np.random.default_rng(1)
    rows = random_rows(40)
    for original in rng.integers(0, 40, 80):  # copies with anything from no token to half of them replaced
        copy = np.array(rows[original])
        copy[rng.random(len(copy)) < rng.uniform(0, 0.5)] = 1001
        rows.append(copy.tolist())
    staying: list[int] = []
    wanted = []
    for place, row in enumerate(rows):
        cosines = [cosine(rows[other], row) for other in staying]
        if cosines and max(cosines) >= similarity - 1e-6:
            wanted.append((place, max(cosines)))
        else:
            staying.append(place)
    duplicates = near_duplicates(rows, similarity)
    assert duplicates["place"].tolist() == [place for place, _ in wanted]
    assert duplicates["similarity"].to_numpy() == pytest.approx([value for _, value in wanted], abs=1e-5)
    assert 3 <= len(wanted) < 80


def test_the_seed_of_the_sketch_makes_no_difference():
    rows, _ = planted()
    first, second = (near_duplicates(rows, 0.7, seed=seed) for seed in (0, 1))
    assert first.equals(second)


def test_odd_rows():
    same = near_duplicates([[1, 2, 3, 4]] * 5, 1.0)
    assert same["place"].tolist() == [1, 2, 3, 4]
    assert set(same["duplicate_of"]) == {0}
    short = near_duplicates([[1], [2], [1], [1, 2], [1, 2]], 1.0)
    assert short["place"].tolist() == [2, 4]
    assert near_duplicates([[7, 8, 9]], 0.5).empty

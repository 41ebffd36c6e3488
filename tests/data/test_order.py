from __future__ import annotations

import math

import numpy as np
import pytest

from jaxmodels.data import Order
from jaxmodels.data.order import permute
from jaxmodels.errors import UserError


def permutation(n: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(n), n, seed, np.full(n, epoch))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 97, 1000, 4097, 99_991])
@pytest.mark.parametrize("seed", [0, 1, -7, 2**70])
def test_an_epoch_holds_every_example_once(n, seed):
    assert np.array_equal(np.sort(permutation(n, seed)), np.arange(n))


def test_a_huge_set_costs_no_more_than_the_batch():
    order = Order(10**15 + 7, 64, 0)
    seen = np.concatenate([order.indices(step) for step in range(100)])
    assert len(np.unique(seen)) == len(seen) and seen.min() >= 0 and seen.max() < 10**15 + 7
    assert 0.4 < (seen < 5 * 10**14).mean() < 0.6


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [permutation(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.01 and abs(np.corrcoef(a, b)[0, 1]) < 0.12


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_orders_of_a_few_examples_come_equally_often(n):
    epochs = 12_000
    out = permute(np.tile(np.arange(n), epochs), n, 5, np.repeat(np.arange(epochs), n)).reshape(epochs, n)
    _, counts = np.unique(out, axis=0, return_counts=True)
    kinds = math.factorial(n)
    assert len(counts) == kinds
    chi_squared = ((counts - epochs / kinds) ** 2).sum() / (epochs / kinds)
    assert chi_squared < kinds - 1 + 4 * math.sqrt(2 * (kinds - 1))


def test_neighbors_are_unrelated():
    x = permutation(100_000)
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(x, np.arange(len(x)))[0, 1]) < 0.02
    assert (np.diff(x) == 1).sum() < 10


@pytest.mark.parametrize("n, batch_size", [(10, 4), (7, 7), (3, 8), (1000, 16)])
def test_epochs_run_on_without_a_gap(n, batch_size):
    order = Order(n, batch_size, 3)
    steps = -(-3 * n // batch_size)
    indices = np.concatenate([order.indices(step) for step in range(steps)])
    epochs = np.concatenate([order.epochs(step) for step in range(steps)])
    assert np.array_equal(epochs, np.arange(steps * batch_size) // n)
    for epoch in range(3):
        assert np.array_equal(np.sort(indices[epochs == epoch]), np.arange(n))
        assert np.array_equal(indices[epochs == epoch], permutation(n, 3, epoch))


def test_a_batch_depends_on_its_step_alone():
    first, again = Order(5000, 24, 1), Order(5000, 24, 1)
    forwards = {step: first.indices(step).copy() for step in range(600)}
    for step in (599, 0, 300, 171, 170, 599):
        assert np.array_equal(again.indices(step), forwards[step])


def test_the_order_is_the_one_that_earlier_runs_had():
    """A change here breaks the resuming of every run begun before it: change these only with that in mind."""
    assert Order(1000, 8, 0).indices(0).tolist() == GOLDEN_0
    assert Order(1000, 8, 42).indices(12345).tolist() == GOLDEN_42


GOLDEN_0 = [149, 21, 114, 897, 216, 637, 336, 799]
GOLDEN_42 = [500, 594, 394, 635, 514, 470, 579, 428]


def test_no_examples_and_no_batch_are_refused():
    with pytest.raises(UserError, match="got a source of 0 examples"):
        Order(0, 4, 0)
    with pytest.raises(UserError, match="got a batch size of 0"):
        Order(4, 0, 0)

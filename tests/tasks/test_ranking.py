"""Where held items come among all that a user did not have: equal to a loop, and to what the data's page says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.config import Interactions
from jaxmodels.data import open_records
from jaxmodels.tasks import ranking
from jaxmodels.tasks.next_item import all_items, sampled
from jaxmodels.tasks.task import divide

U, V = 40, 150


def loop(scores, seen, held):
    """The metrics of users that have something held, one after the other."""
    found = []
    for row, past, new in zip(scores, seen, held, strict=True):
        wanted = [i for i in new if i >= 0]
        if not wanted:
            continue
        left = [i for i in range(len(row)) if i not in past]
        order = sorted(left, key=lambda i: (-row[i], i))
        place = {item: at for at, item in enumerate(order, 1)}
        places = [place[i] for i in wanted]
        best = sum(1 / math.log2(1 + at) for at in range(1, min(10, len(wanted)) + 1))
        found.append(
            {
                "hr@10": any(at <= 10 for at in places),
                "ndcg@10": sum(1 / math.log2(1 + at) for at in places if at <= 10) / best,
                "mrr": 1 / min(places),
                "recall@10": sum(at <= 10 for at in places) / len(wanted),
                "recall@100": sum(at <= 100 for at in places) / len(wanted),
            }
        )
    return {name: np.mean([each[name] for each in found]) for name in found[0]}


def test_metrics_are_those_of_a_loop_over_users_with_ties_and_padding():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 30, (U, V)).astype(np.float32)  # of which many are equal
    orders = np.stack([rng.permutation(V) for _ in range(U)])
    seen, held = orders[:, :8].astype(np.int32), orders[:, 8:23].astype(np.int32)
    for row in range(U):
        seen[row, rng.integers(0, 9) :], held[row, rng.integers(0, 16) :] = -1, -1
    assert (held >= 0).any(1).sum() < U, "some have nothing held"
    batch = {"seen": jnp.array(seen), "held": jnp.array(held)}
    found = jax.jit(ranking.sums)(jnp.array(scores), batch)
    assert divide(found) == pytest.approx(loop(scores, seen, held), rel=1e-5)
    counts = np.arange(U) % 3 > 0
    found = jax.jit(ranking.sums)(jnp.array(scores), {**batch, "weight": jnp.array(counts, jnp.float32)})
    assert divide(found) == pytest.approx(loop(scores[counts], seen[counts], held[counts]), rel=1e-5)


def values(records, *fields):
    return [row for row in records.read(range(len(records)), fields) if isinstance(row, dict)]


def test_the_popularity_of_items_ranks_as_the_page_of_the_data_says(shared_data):
    folder = shared_data / "online_retail"
    cfg = Interactions(
        path=(str(folder / "interactions.csv"),), items=(str(folder / "items.csv"),), eval_from="2011-11-01"
    )
    train, held_out = (open_records(cfg, split) for split in ("train", "eval"))
    names = ("items", "held")
    popular = np.zeros(len(train.fields["items"].names), np.float32)
    for row in values(train, "items"):
        popular[list(row["items"])] += 1
    rows = values(held_out, *names)
    assert len(rows) == 1442
    most = {name: max(len(row[name]) for row in rows) for name in names}
    seen, held = (np.array([[*row[n], *[-1] * (most[n] - len(row[n]))] for row in rows], np.int32) for n in names)
    found = jax.jit(ranking.sums)(jnp.tile(popular, (len(rows), 1)), {"seen": seen, "held": held})
    metrics = divide(found)
    assert round(metrics["hr@10"], 2) == 0.25 and round(metrics["ndcg@10"], 3) == 0.037


@functools.cache
def vectors():
    rng = np.random.default_rng(1)
    x, table = (jnp.array(rng.normal(size=shape), jnp.float32) for shape in ((3, 4, 8), (V, 8)))
    targets = jnp.array(rng.integers(-1, V, (3, 4)), jnp.int32)
    return x, table, targets


def test_a_sampled_partition_is_that_of_all_items_on_average():
    x, table, targets = vectors()
    exact = all_items(x, table, targets)
    run = jax.jit(jax.vmap(lambda key: sampled(key, x, table, targets, 100), 0))
    found = run(jax.random.split(jax.random.key(0), 500))
    assert int(found.count[0]) == int(exact.count) == int((targets >= 0).sum())
    own = jnp.einsum("btd,btd->bt", x, table[jnp.maximum(targets, 0)])

    @jax.jit
    @jax.vmap
    def partition(key):
        return jnp.stack(
            [jnp.exp(sampled(key, x[:1, i : i + 1], table, targets[:1, i : i + 1], 100).loss) for i in (0, 1)]
        )

    # exp(loss) is the partition over the target's own weight, which is unbiased
    mean = partition(jax.random.split(jax.random.key(1), 4000)).mean(0)
    log_z = jax.nn.logsumexp(x[0] @ table.T, -1)
    np.testing.assert_allclose(mean, jnp.exp(log_z - own[0])[:2], rtol=0.1)
    assert float(found.loss.mean()) == pytest.approx(float(exact.loss), rel=0.05)

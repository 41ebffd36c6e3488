"""Two towers: rows of data, both losses against loops, the ranking of a whole set, and what is recommended."""

import csv
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels import tasks
from jaxmodels.config import Config, Interactions, Metrics, Stdlib, Train
from jaxmodels.data import open_source
from jaxmodels.data.purchases import words_of
from jaxmodels.errors import UserError
from jaxmodels.generate.recommend import history, recommender
from jaxmodels.models.two_tower import TwoTowerConfig
from jaxmodels.tasks.retrieval import Retrieval
from jaxmodels.tasks.task import divide
from jaxmodels.train import load_run
from tests.sections import untrained
from tests.tasks.test_ranking import loop
from tests.zoo import arrays

V, U, T, W, DAY = 30, 12, 4, 3, 86_400
CONTENT = TwoTowerConfig(V, width=8, words=40, name_words=W, hidden=(6,))
FACTORS = TwoTowerConfig(V, width=8, history=False, users=U)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Twelve users who take two items at a time, on four days, the last after day 10; names share words."""
    folder, rng = tmp_path_factory.mktemp("shop"), np.random.default_rng(0)
    taken = [rng.permutation(V)[:8].tolist() for _ in range(U)]
    rows = [
        (user, item, (3 * (at // 2) + 2) * DAY) for user, items in enumerate(taken) for at, item in enumerate(items)
    ]
    tables = {
        "log.csv": [("user", "item", "time"), *rows],
        "items.csv": [("item", "description"), *((item, f"gift {item % 5} no. {item}") for item in range(V))],
    }
    for name, lines in tables.items():
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(lines)
    paths = {"path": (str(folder / "log.csv"),), "items": (str(folder / "items.csv"),)}
    return folder, taken, Interactions(**paths, eval_from="1970-01-11", seq_len=T, batch_size=8)


def opened(config, data, split="train", **fields):
    task = Retrieval(**fields)
    return open_source(data, split, task, vocab_size=V, fields=tasks.build(task, config, data).fields)


def test_an_item_is_taken_after_all_baskets_of_its_history(shop):
    _, taken, data = shop
    source = opened(CONTENT, data)
    batch = source.batch(np.arange(len(source)), np.zeros(len(source), int))
    assert len(source) == U * 4, "of three baskets those two that are not the first"
    for user, tokens, real, item in zip(*(batch[n] for n in ("user", "tokens", "segment_ids", "item")), strict=True):
        at = taken[user].index(item) // 2 * 2
        assert set(tokens[real > 0].tolist()) == set(taken[user][max(0, at - T) : at])
    share = np.bincount(batch["item"], minlength=V) / len(source)
    np.testing.assert_allclose(batch["log_q"], np.log(share[batch["item"]]), rtol=1e-5)
    names = words_of(source.class_names, 40, W)
    np.testing.assert_array_equal(batch["words"][:, -1], names[batch["item"]])
    np.testing.assert_array_equal(batch["words"][0, -2], names[batch["tokens"][0, -1]])
    assert (batch["words"][:, :-1][batch["segment_ids"] == 0] == -1).all()
    assert len(set(names[:, 0].tolist())) == 1 and names[1, 1] == names[6, 1] != names[2, 1], "equal words are equal"


def test_all_users_and_all_items_are_evaluated(shop):
    _, _, data = shop
    batch = opened(CONTENT, data, "eval").batch(np.arange(V), np.zeros(V, int))
    assert batch["item"].tolist() == list(range(V))
    there = (batch["held"] >= 0).any(1)
    assert there[:U].all() and not there[U:].any() and (batch["seen"][U:] == -1).all()


@functools.cache
def batch_of(config, objective):
    """A batch of eight rows, of which the last does not count and two have the same item, and the loss's parts."""
    task = tasks.build(Retrieval(objective), config, Stdlib(seq_len=T, batch_size=8))
    rng = np.random.default_rng(3)
    batch = {
        name: rng.integers(0, field.below or 2, (8, *field.shape)).astype(np.int32)
        for name, field in task.fields.items()
        if field.shape is not None and name != "log_q"
    }
    batch["item"] = np.array([3, 4, 3, 7, 8, 9, 10, 11], np.int32)
    batch["log_q"] = np.log(rng.random(8)).astype(np.float32)
    batch["weight"] = np.array([1] * 7 + [0], np.float32)
    params = arrays(jaxmodels.create(config))
    run = jax.jit(lambda params, batch: task.losses[0].fn({"model": params}, {}, batch, jax.random.key(0)))
    return params, batch, run(params, batch)


def test_the_loss_of_a_batch_is_the_softmax_with_logq():
    params, batch, (total, aux) = batch_of(FACTORS, "softmax")
    user, item, bias = (np.asarray(params[name]["w"]) for name in ("user", "item", "bias"))
    expected = 0.0
    for row in range(7):
        logits = {
            other: user[batch["user"][row]] @ item[batch["item"][other]]
            + bias[batch["item"][other], 0]
            - batch["log_q"][other]
            for other, i in enumerate(batch["item"][:7])
            if other == row or batch["item"][other] != batch["item"][row]
        }
        expected += math.log(sum(map(math.exp, logits.values()))) - logits[row]
    assert float(total) == pytest.approx(expected, rel=1e-5) and float(aux.weight) == 7


def test_bpr_is_the_chance_that_an_item_is_above_another():
    params, batch, (total, aux) = batch_of(FACTORS, "bpr")
    user, item, bias = (np.asarray(params[name]["w"]) for name in ("user", "item", "bias"))
    margins = [
        user[batch["user"][row]] @ (item[mine] - item[other]) + bias[mine, 0] - bias[other, 0]
        for row, (mine, other) in enumerate(zip(batch["item"][:7], batch["other"][:7], strict=True))
        if mine != other
    ]
    assert float(total) == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins), rel=1e-5)
    assert float(aux.weight) == len(margins)


def test_towers_of_names_are_means_of_items_and_of_words():
    model = jaxmodels.create(CONTENT)
    params = arrays(model)
    p = jax.tree.map(np.asarray, params)
    rng = np.random.default_rng(5)
    history = np.array([[-1, 4, 9]], np.int32)
    words = rng.integers(0, 40, (1, 4, W)).astype(np.int32)
    words[0, 0], words[0, 2, 1:] = -1, -1
    users, items = model.apply(params, jnp.zeros(1, int), jnp.array(history), jnp.array([7]), jnp.array(words))
    read = lambda table, row: p[table]["w"][[w for w in row if w >= 0]].mean(0)  # noqa: E731
    x = np.mean([p["history"]["w"][i] + read("history_words", words[0, at]) for at, i in ((1, 4), (2, 9))], 0)
    x = np.maximum(x @ p["hidden0"]["w"] + p["hidden0"]["b"], 0) @ p["output"]["w"] + p["output"]["b"]
    np.testing.assert_allclose(users[0], [*x, 1], atol=1e-5)
    y = p["item"]["w"][7] + read("item_words", words[0, 3])
    np.testing.assert_allclose(items[0], [*y, p["bias"]["w"][7, 0]], atol=1e-5)
    alone = model.apply(params, None, None, jnp.array([7]), jnp.array(words[:, 3:]))[1]
    np.testing.assert_allclose(alone, items, atol=1e-6)
    assert jaxmodels.create(FACTORS).count() == (U + V) * 8 + V, "matrix factorization with a bias of items"


@pytest.fixture(scope="module")
def run(shop):
    folder, _, data = shop
    cfg = Config(
        model=CONTENT,
        task=Retrieval(),
        data=data,
        train=Train(steps=1),
        metrics=Metrics(every=100, progress="none", loggers=()),
    )
    return load_run(untrained(cfg, folder / "run"))


def test_a_whole_set_is_ranked_as_by_a_loop_and_as_what_is_recommended(run):
    evaluation = run.evaluation()
    found = evaluation.measure()
    batch = evaluation.examples(0, V)
    scores = run.config.task.scorer(run.model, run.kept.classes)
    scores = np.asarray(jax.jit(scores)(run.params, {}, {name: jnp.array(x[:U]) for name, x in batch.items()}))
    expected = loop(scores, batch["seen"][:U], batch["held"][:U])
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    whole = divide(jax.jit(run.task.metrics)(run.params, {}, {name: jnp.array(x) for name, x in batch.items()}))
    assert whole == pytest.approx(found, rel=1e-4)
    seen = batch["seen"][0][batch["seen"][0] >= 0].tolist()
    (answer,) = recommender(run)([history(run)(seen)])
    order = [i for i in np.argsort(-scores[0], kind="stable").tolist() if i not in seen][:10]
    assert answer["items"] == [run.kept.classes[i] for i in order]


def test_what_does_not_fit_is_refused(shop):
    _, _, data = shop
    with pytest.raises(UserError, match="got 12 users, expected at most model.users 5"):
        opened(TwoTowerConfig(V, width=8, history=False, users=5), data)
    with pytest.raises(UserError, match="--model.history True"):
        TwoTowerConfig(V, history=False)
    with pytest.raises(UserError, match="knows users by their numbers alone"):
        Retrieval().scorer(jaxmodels.create(FACTORS), ["a"] * V)


def test_vectors_of_users_are_not_read_by_the_numbers_of_others(shop, tmp_path):
    """Users are numbered by their order in a table, so another table would give their vectors to other users."""
    folder, _, data = shop
    run = load_run(untrained(Config(model=FACTORS, task=Retrieval(), data=data), tmp_path / "run"))
    assert run.kept.groups == tuple(map(str, range(U))) and run.evaluation().source.groups == run.kept.groups
    lines = (folder / "log.csv").read_text().splitlines()
    other = tmp_path / "other.csv"
    other.write_text("\n".join([lines[0], *(f"9{line}" for line in lines[1:])]) + "\n")
    with pytest.raises(UserError, match=r"got users that the model was not trained on \(90, 91, "):
        run.evaluation({"path": (str(other),)})

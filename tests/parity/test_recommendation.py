"""SASRec equals a module of torch written from its paper: logits, loss and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.models.sasrec import SASRecConfig
from jaxmodels.tasks.next_item import all_items
from tests.zoo import arrays

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, T, V = 3, 7, 23
CONFIG = SASRecConfig(V, context=T, layers=2, heads=2, width=8, mlp_width=12, dropout=0.0)
LENGTHS = (7, 3, 1)


class Theirs(torch.nn.Module):
    """Section 3 of Kang & McAuley 2018: embedding and positions, x + g(LayerNorm(x)), and the shared output layer."""

    def __init__(self):
        super().__init__()
        c, nn = CONFIG, torch.nn
        self.items, self.places = nn.Embedding(V, c.width), nn.Embedding(T, c.width)
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(c.width, c.heads, bias=False, batch_first=True) for _ in "12"
        )
        self.first, self.second = (nn.ModuleList(nn.LayerNorm(c.width) for _ in "12") for _ in "12")
        self.up = nn.ModuleList(nn.Linear(c.width, c.mlp_width) for _ in "12")
        self.down = nn.ModuleList(nn.Linear(c.mlp_width, c.width) for _ in "12")
        self.last = nn.LayerNorm(c.width)

    def forward(self, items, real):
        x = self.items(items) + self.places.weight
        hidden = ~torch.tril(torch.ones(T, T, dtype=bool)) | (real[:, None, :] != real[:, :, None])
        hidden = hidden.repeat_interleave(CONFIG.heads, 0)
        for attention, first, second, up, down in zip(
            self.attention, self.first, self.second, self.up, self.down, strict=True
        ):
            y = first(x)
            x = x + attention(y, y, y, attn_mask=hidden, need_weights=False)[0]
            x = x + down(torch.relu(up(second(x))))
        return self.last(x) @ self.items.weight.T


def load(theirs, params):
    """Give their module our parameters."""
    state = {}

    def put(name, value):
        state[name] = torch.tensor(np.array(value))

    put("items.weight", params["embed"]["w"]), put("places.weight", params["positions"]["w"])
    put("last.weight", params["norm"]["scale"]), put("last.bias", params["norm"]["bias"])
    layers, D = params["layers"], CONFIG.width
    for i in range(CONFIG.layers):
        attn = {name: np.asarray(layers["attn"][name]["w"][i]) for name in "qkvo"}
        put(f"attention.{i}.in_proj_weight", np.concatenate([attn[n].reshape(D, D).T for n in "qkv"]))
        put(f"attention.{i}.out_proj.weight", attn["o"].reshape(D, D).T)
        for name, ours in (("first", "attn_norm"), ("second", "mlp_norm")):
            put(f"{name}.{i}.weight", layers[ours]["scale"][i]), put(f"{name}.{i}.bias", layers[ours]["bias"][i])
        for name in ("up", "down"):
            put(f"{name}.{i}.weight", np.asarray(layers["mlp"][name]["w"][i]).T)
            put(f"{name}.{i}.bias", layers["mlp"][name]["b"][i])
    theirs.load_state_dict(state)


def test_sasrec_is_torch_s():
    rng = np.random.default_rng(0)
    items = rng.integers(0, V, (B, T)).astype(np.int32)
    real = np.array([[0] * (T - n) + [1] * n for n in LENGTHS], np.int32)
    targets = np.where(real > 0, rng.integers(0, V, (B, T)), -1).astype(np.int32)
    model = jaxmodels.create(CONFIG)
    params, theirs = arrays(model), Theirs()
    load(theirs, params)
    logits = theirs(torch.tensor(items), torch.tensor(real))
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, V), torch.tensor(targets).long().reshape(-1), ignore_index=-1, reduction="sum"
    )
    loss.backward()

    @jit
    def ours(params):
        def total(params):
            x = model.apply(params, jnp.array(items), segment_ids=jnp.array(real), head=False)
            s = all_items(x, model.unembedding(params), jnp.array(targets))
            return s.objective, model.apply(params, jnp.array(items), segment_ids=jnp.array(real))

        return jax.value_and_grad(total, has_aux=True)(params)

    (mine, found), grads = ours(params)
    counts = real > 0
    np.testing.assert_allclose(np.asarray(found)[counts], logits.detach().numpy()[counts], atol=2e-5)
    assert float(mine) == pytest.approx(loss.item(), rel=1e-5)
    np.testing.assert_allclose(grads["embed"]["w"], theirs.items.weight.grad, atol=2e-5)
    np.testing.assert_allclose(grads["positions"]["w"], theirs.places.weight.grad, atol=2e-5)
    for i in range(CONFIG.layers):
        up = grads["layers"]["mlp"]["up"]["w"][i]
        np.testing.assert_allclose(np.asarray(up).T, theirs.up[i].weight.grad, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "items", "places"),
    [
        ("sasrec-ml-1m", 3416, 200),
        ("sasrec-beauty", 57_289, 50),
        ("sasrec-games", 23_715, 50),
        ("sasrec-steam", 13_047, 50),
    ],
)
def test_presets_have_the_parameters_of_the_paper(name, items, places):
    """Embeddings of the sets of table 2, and two blocks of 50 units: four projections, two layers, two norms."""
    D = 50
    block = 4 * D * D + 2 * (D * D + D) + 2 * 2 * D
    assert jaxmodels.create(name).count() == (items + places) * D + 2 * block + 2 * D

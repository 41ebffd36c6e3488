"""The same weights give the outputs, last states and gradients of torch.nn.LSTM, padded and in both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.models.lstm import LSTMConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")

B, T, V, D, H = 4, 9, 31, 6, 5
LENGTHS = (9, 4, 1, 6)
CASES = {
    "language-model": LSTMConfig(vocab_size=V, width=D, hidden=H, layers=3),
    "classifier": LSTMConfig(vocab_size=V, width=D, hidden=H, layers=2, classes=3),
    "bidirectional": LSTMConfig(vocab_size=V, width=D, hidden=H, layers=2, classes=3, bidirectional=True),
}
# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Theirs(torch.nn.Module):
    """Embedding, torch.nn.LSTM and output layer; sequences of unequal length are packed."""

    def __init__(self, config):
        super().__init__()
        c, ways = config, 1 + config.bidirectional
        self.config = c
        self.embed = torch.nn.Embedding(V, D)
        self.lstm = torch.nn.LSTM(D, H, c.layers, batch_first=True, bidirectional=c.bidirectional)
        self.head = torch.nn.Linear(H * ways, c.classes or V, bias=c.classes is not None)

    def forward(self, tokens, lengths):
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            self.embed(tokens), torch.tensor(lengths), batch_first=True, enforce_sorted=False
        )
        outputs, (h, c) = self.lstm(packed)
        outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=T)
        last = torch.cat([h[-2], h[-1]], -1) if self.config.bidirectional else h[-1]
        return self.head(outputs if self.config.classes is None else last), h, c


def tree(config, of):
    """A model's tensors (`of` a parameter: itself, or its gradient) as our tree; of the two biases, what `of` says."""
    params = {"embed": {"w": of("embed.weight")}, "head": {"w": of("head.weight")}}
    if config.classes is not None:
        params["head"] = {"w": of("head.weight").T, "b": of("head.bias")}
    for i in range(config.layers):
        layer = params[f"layer{i}"] = {}
        for name, suffix in (("forward", ""), ("reverse", "_reverse"))[: 1 + config.bidirectional]:
            x, h = (of(f"lstm.weight_{part}_l{i}{suffix}").T for part in ("ih", "hh"))
            layer[name] = {
                "x": {"w": x.reshape(-1, 4, H), "b": of(f"lstm.bias_l{i}{suffix}").reshape(4, H)},
                "h": {"w": h.reshape(H, 4, H)},
            }
    return params


@pytest.fixture(scope="module", params=CASES)
def case(request):
    config = CASES[request.param]
    torch.manual_seed(0)
    theirs = Theirs(config)
    named = dict(theirs.named_parameters())
    for p in named.values():
        p.data = torch.randn_like(p) * 0.7

    def value(name):
        if name.startswith("lstm.bias_"):
            return sum(named[name.replace("bias_", f"bias_{part}_")].detach().numpy() for part in ("ih", "hh"))
        return named[name].detach().numpy()

    def gradient(name):
        return named[name.replace("lstm.bias_", "lstm.bias_ih_")].grad.numpy()

    tokens = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
    params = jax.tree.map(jnp.asarray, tree(config, value))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, jaxmodels.create(config).shapes())
    return config, theirs, params, tokens, lambda: tree(config, gradient)


def ids(lengths):
    return jnp.asarray(np.arange(T) < np.array(lengths)[:, None], jnp.int32)


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("lengths", [(T,) * B, LENGTHS], ids=["equal", "padded"])
def test_outputs_and_gradients_equal_torch(case, lengths):
    config, theirs, params, tokens, gradient = case
    real = ids(lengths)
    direction = np.random.default_rng(1).normal(size=(B, T, V) if config.classes is None else (B, 3)).astype("f")
    if config.classes is None:
        direction *= np.asarray(real)[..., None]

    def total(params):
        outputs = jaxmodels.create(config).apply(params, jnp.asarray(tokens), segment_ids=real)
        return (outputs * direction).sum(), outputs

    grads, got = jit(jax.grad(total, has_aux=True))(params)
    theirs.zero_grad()
    expected, _, _ = theirs(torch.tensor(tokens), lengths)
    (expected * torch.tensor(direction)).sum().backward()
    expected = expected.detach().numpy()
    if config.classes is None:  # what stands at padding is of no account
        got, expected = (np.asarray(x)[np.asarray(real) > 0] for x in (got, expected))
    close(got, expected)
    assert np.abs(expected).max() > 0.3
    jax.tree.map(lambda a, b: close(a, b, 2e-5 * max(1, np.abs(b).max())), grads, gradient())


def test_last_states_equal_torch(case):
    config, theirs, params, tokens, _ = case
    if config.classes is not None:
        return
    model = jaxmodels.create(config)
    _, cache = model.apply(params, jnp.asarray(tokens), segment_ids=ids(LENGTHS), cache=model.cache(B, T))
    _, h, c = theirs(torch.tensor(tokens), LENGTHS)
    close(cache["h"], h.detach())
    close(cache["c"], c.detach())
    assert cache["length"].tolist() == [T] * len(cache["length"])

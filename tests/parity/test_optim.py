"""Update rules equal PyTorch's over ten steps, with an epsilon as large as the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels.config import Constant
from jaxmodels.models.parameters import Axes
from jaxmodels.train.optim import OPTIMIZERS
from tests.quick import kind

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")

THEIRS = {
    "adam": lambda p, c: torch.optim.Adam(p, c.peak_lr, (c.b1, c.b2), c.eps),
    "adamw": lambda p, c: torch.optim.AdamW(p, c.peak_lr, (c.b1, c.b2), c.eps, c.weight_decay),
    "rmsprop": lambda p, c: torch.optim.RMSprop(p, c.peak_lr, c.b2, c.eps),
    "momentum": lambda p, c: torch.optim.SGD(p, c.peak_lr, c.b1),
    "sgd": lambda p, c: torch.optim.SGD(p, c.peak_lr),
}


@pytest.mark.parametrize("name", THEIRS)
def test_ten_steps_equal_torch(name):
    decay = 0.3 if name == "adamw" else 0.0
    cfg = kind(
        OPTIMIZERS, name, peak_lr=0.1, b1=0.8, b2=0.9, eps=0.01, weight_decay=decay, clip_norm=None, schedule=Constant()
    )
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(4, 3)).astype(np.float32), (0.01 * rng.normal(size=(10, 4, 3))).astype(np.float32)
    theirs = torch.tensor(start, requires_grad=True)
    rule = THEIRS[name]([theirs], cfg)
    tx, params = cfg.build(10, {"w": Axes(("embed", "mlp"), "matrix")}), {"w": jnp.asarray(start)}
    opt_state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        theirs.grad = torch.tensor(g)
        rule.step()
        updates, opt_state = update({"w": g}, opt_state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], theirs.detach().numpy(), rtol=1e-5, atol=1e-6)

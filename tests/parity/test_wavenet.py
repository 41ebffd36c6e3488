"""The same weights give the outputs of a WaveNet written with torch's convolutions."""

import numpy as np
import pytest

import jaxmodels
from tests.zoo import arrays

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")


def theirs(config, params, samples, conditions):
    """The logits (B, T, V) by one-hot inputs and dilated convolutions, as the paper draws them."""
    F, tensor = torch.nn.functional, lambda x: torch.tensor(np.asarray(x))
    onehot = F.one_hot(torch.tensor(samples).long(), config.levels).float().transpose(1, 2)
    first = torch.stack([tensor(params["embed_before"]["w"]), tensor(params["embed"]["w"])], -1).transpose(0, 1)
    x = F.conv1d(F.pad(onehot, (1, 0)), first)
    rows = torch.tensor(conditions).long()
    h = sum(tensor(params[f"condition{i}"]["w"])[rows[:, i]] for i in range(len(config.conditions)))
    total = 0
    for stack in range(config.stacks):
        for i in range(config.depth):
            own = {
                name: {k: tensor(v)[stack] for k, v in leaf.items()}
                for name, leaf in params["layers"][f"layer{i}"].items()
            }

            def gate(name, own=own, i=i, x=x):
                w = own[name]["w"].reshape(2, config.width, -1).permute(2, 1, 0)
                y = F.conv1d(F.pad(x, (2**i, 0)), w, own[name]["b"], dilation=2**i)
                return y + (h @ own[f"{name}_condition"]["w"])[..., None]

            def linear(name, x, own=own):
                return F.conv1d(x, own[name]["w"].T[..., None], own[name]["b"])

            z = torch.tanh(gate("filter")) * torch.sigmoid(gate("gate"))
            total = total + linear("skip", z)
            x = x + linear("out", z)
    y = torch.relu(total).transpose(1, 2)
    y = torch.relu(y @ tensor(params["last"]["w"]) + tensor(params["last"]["b"]))
    return (y @ tensor(params["head"]["w"]).T).numpy()


def test_outputs_are_those_of_dilated_convolutions():
    model = jaxmodels.create("wavenet", levels=11, stacks=2, depth=3, width=6, hidden=5, skip=7, conditions=(3, 2))
    params, rng = arrays(model), np.random.default_rng(0)
    samples, conditions = rng.integers(0, 11, (2, 40)), np.array([[0, 1], [2, 0]])
    found = np.asarray(model.apply(params, samples.astype(np.int32), conditions.astype(np.int32)))
    expected = theirs(model.config, params, samples, conditions)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())

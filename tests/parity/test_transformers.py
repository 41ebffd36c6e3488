"""The same weights give the training that transformers and torch give; their logits are in test_hf.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels import tasks
from jaxmodels.config import AdamW, Constant, Mesh, Stdlib
from jaxmodels.data.contract import BatchField
from jaxmodels.models import layers
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.tasks.losses import cross_entropy
from jaxmodels.tasks.task import Loss, Task, forward, scored
from jaxmodels.train import state, step
from tests.sections import task_of

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

V, B, T, STEPS = 97, 4, 24, 50
EAGER = {"attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    **EAGER,
}
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "attn_implementation": "eager",
}


def gpt2():
    sizes = {"vocab_size": V, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **EAGER))


def llama(**settings):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **settings}))


def bert():
    # to the embedding of padding they give no gradient
    sizes = {"vocab_size": V, "max_position_embeddings": 32, "pad_token_id": None}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **TOWER))


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=12, patch_size=4, num_labels=5, **TOWER)
    )


MODELS = {
    "gpt2": gpt2,
    "llama-1-kv-head": llama,
    "llama-all-heads-tied": functools.partial(llama, num_key_value_heads=6, tie_word_embeddings=True),
    "bert-masked-lm": bert,
    "vit-classification": vit,
}


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    """A model of transformers with random weights, and what loads it here."""
    torch.manual_seed(0)
    theirs = MODELS[request.param]()
    for name, p in theirs.named_parameters():
        scale = name.endswith("weight") and p.ndim == 1
        p.data = torch.randn_like(p) * (0.1 if p.ndim > 1 else 0.2) + float(scale)
    theirs.float().eval().save_pretrained(tmp_path)  # eval: no dropout, also while it is trained
    dropout = {} if request.param.startswith("llama") else {"dropout": 0.0}
    return theirs, functools.partial(jaxmodels.load_pretrained, tmp_path, **dropout)


def batches(model):
    """Inputs and labels, below 0 where there is none; learned soon: an eighth of the vocabulary, or bright and dark."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        if model.config.model_type == "vit":
            labels = rng.integers(0, 5, B).astype(np.int32)
            yield rng.normal(labels[:, None, None, None] / 4, 1, (B, 12, 12, 3)).astype(np.float32), labels
            continue
        rows = rng.integers(0, V // 8, (B, T + 1)).astype(np.int32) * 8
        if model.config.model_type == "bert":
            masked = rng.random((B, T)) < 0.3
            yield np.where(masked, V - 1, rows[:, 1:]), np.where(masked, rows[:, 1:], -100)
        else:
            yield rows[:, :-1], rows[:, 1:]


def logits_of(model, x):
    x = torch.from_numpy(x)
    return model(x.permute(0, 3, 1, 2) if x.ndim == 4 else x.long()).logits


def train_theirs(model, lr, decay):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for x, labels in batches(model):
        logits, wanted = logits_of(model, x), torch.from_numpy(labels).long()
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def restoring(model):
    """The task of predicting the tokens that have a label, from all others."""

    def score(params, stats, batch, **kwargs):
        logits, stats = forward(("model", model), params, stats, batch["tokens"], **kwargs)
        return cross_entropy(logits, batch["targets"]), stats

    rows = BatchField((T,), axes=("seq",))
    loss, metrics = scored(score)
    return Task({"model": model}, (Loss("loss", "model", loss),), metrics, {"tokens": rows, "targets": rows})


def train_ours(reference, model, params, lr, decay):
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    section = Stdlib(seq_len=T, batch_size=B)
    kind = reference.config.model_type
    names = ("inputs", "labels") if kind == "vit" else ("tokens", "targets")
    if kind == "bert":
        task = restoring(model)
    else:
        task = tasks.build(task_of("classification" if kind == "vit" else "causal_lm"), model.config, section)
    cfg = AdamW(peak_lr=lr, b1=0.9, b2=0.95, eps=1e-8, weight_decay=decay, clip_norm=1.0, schedule=Constant())
    optimizers = {loss.name: cfg.build(STEPS, task.axes()[loss.trains]) for loss in task.losses}
    layout = state.layout(task, optimizers, mesh)
    moments = {loss.name: optimizers[loss.name].init(params) for loss in task.losses}
    now = state.State(jnp.zeros((), jnp.int32), {"model": params}, {}, moments, None, jax.random.key(0))
    now = jax.device_put(now, jax.tree.map(lambda leaf: leaf.sharding, layout))
    rows = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in task.batch_spec(B).items()}
    take = step.build_step(task, optimizers, mesh, layout, rows)
    losses, norms = [], []
    for batch in batches(reference):
        placed = dict(zip(names, batch, strict=True))
        placed = jax.device_put(placed, task.shardings(mesh, placed))
        now, metrics = take(now, placed)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return losses, norms, now.params["model"]


def test_fifty_steps_of_adamw_are_those_of_torch(pair, tmp_path):
    (reference, load), lr, decay = pair, 3e-3, 0.3
    losses, norms, end = train_ours(reference, *load(), lr, decay)
    expected, their_norms = train_theirs(reference, lr, decay)
    assert np.mean(expected[-5:]) < np.mean(expected[:5]) - 0.3 and max(their_norms) > 1, "learned, and clipped"
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-3)
    np.testing.assert_allclose(norms, their_norms, rtol=2e-2)
    # Adam enlarges rounding where a gradient is nearly 0, as that of keys' biases
    reference.save_pretrained(tmp_path / "end")
    _, wanted = jaxmodels.load_pretrained(tmp_path / "end")
    wrong = jax.tree.map(lambda a, b: np.mean(np.abs(np.asarray(a) - np.asarray(b)) > 2e-3), end, wanted)
    wrong["layers"]["attn"]["k"].pop("b", None)
    assert max(jax.tree.leaves(wrong)) < 0.01


def test_convolution_equals_torchs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 8, 6)).astype(np.float32)
    for strides, pad, groups in (((1, 1), 1, 1), ((2, 3), 0, 2), ((2, 1), 2, 3)):
        conv = torch.nn.Conv2d(6, 12, (3, 5), strides, pad, groups=groups)
        with torch.no_grad():
            expected = conv(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
        params = {"w": conv.weight.detach().permute(2, 3, 1, 0).numpy(), "b": conv.bias.detach().numpy()}
        layer = layers.Conv(12, (3, 5), strides, ((pad, pad), (pad, pad)), groups)
        np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)


def test_batch_norm_equals_torchs():
    rng = np.random.default_rng(0)
    theirs = torch.nn.BatchNorm2d(5, eps=1e-5, momentum=0.1)
    theirs.weight.data, theirs.bias.data = torch.randn(5), torch.randn(5)
    params = {"scale": theirs.weight.detach().numpy(), "bias": theirs.bias.detach().numpy()}
    stats = {"mean": jnp.zeros(5), "var": jnp.ones(5)}
    layer = layers.BatchNorm(momentum=0.9, eps=1e-5)
    for train in (True, True, True, False):
        x = (rng.normal(size=(3, 4, 2, 5)) * 3 + 7).astype(np.float32)
        theirs.train(train)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
        out, new = layer.apply({"params": params, "stats": stats}, x, train, mutable=["stats"])
        stats = new["stats"]
        np.testing.assert_allclose(out, expected, atol=1e-4)
        np.testing.assert_allclose(stats["mean"], theirs.running_mean, atol=1e-5)
        np.testing.assert_allclose(stats["var"], theirs.running_var, rtol=1e-4)

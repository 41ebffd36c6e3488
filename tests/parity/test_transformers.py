"""The same weights give the logits and the training that transformers and torch give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels import tasks
from jaxmodels.config import DataConfig, MeshConfig, OptimConfig, TaskConfig
from jaxmodels.models import layers
from jaxmodels.models.attention import RopeScaling
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.parallel import rules
from jaxmodels.parallel.mesh import make_mesh
from jaxmodels.train import optim, state, step

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

V, B, T, STEPS = 97, 4, 24, 20
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32)
LLAMA = LlamaConfig(vocab_size=V, layers=2, heads=6, kv_heads=1, width=48, mlp_width=88, context=64, norm_eps=1e-5)
CASES = {
    "gpt2": GPT2Config(vocab_size=V, context=32, layers=2, heads=3, width=48),
    "gpt2-wide-mlp": GPT2Config(vocab_size=V, context=24, layers=3, heads=2, width=20, mlp_width=36),
    "llama-1-kv-head": LLAMA,
    "llama-all-heads-tied": dataclasses.replace(LLAMA, kv_heads=None, tied=True, norm_eps=1e-6),
    "llama-3-scaling-head-dim": dataclasses.replace(
        LLAMA, kv_heads=2, head_dim=10, rope_theta=500.0, rope_scaling=SCALING
    ),
}


def theirs(config):
    """The model of transformers with these settings and random weights."""
    torch.manual_seed(0)
    common = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
    if isinstance(config, GPT2Config):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_positions=config.context,
                n_embd=config.width,
                n_layer=config.layers,
                n_head=config.heads,
                n_inner=config.mlp_width,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            )
        )
    else:
        rope: dict = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.rope_scaling.factor != 1:
            s = config.rope_scaling
            rope |= {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_context,
            }
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=config.width,
                intermediate_size=config.mlp_width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads or config.heads,
                head_dim=config.head_size,
                max_position_embeddings=config.context,
                rms_norm_eps=config.norm_eps,
                tie_word_embeddings=config.tied,
                rope_parameters=rope,
                **common,
            )
        )
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * (0.1 if p.ndim > 1 else 0.2) + float("norm" in name or ".ln_" in name)
    return model.float()


def ours(config, model):
    """The weights of a model of transformers as our tree."""
    w = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    D, H, L = config.width, config.heads, range(config.layers)

    def stack(name, convert=lambda x: x):
        return np.stack([convert(w[name.format(i)]) for i in L])

    if isinstance(config, GPT2Config):
        h = "transformer.h.{}."

        def layer(name):  # Conv1D keeps its weights as (inputs, outputs)
            return {"w": stack(h + name + ".weight"), "b": stack(h + name + ".bias")}

        def norm(name):
            return {"scale": stack(h + name + ".weight"), "bias": stack(h + name + ".bias")}

        merged, o, K = layer("attn.c_attn"), layer("attn.c_proj"), D // H
        attn = {
            name: {
                "w": merged["w"][..., i * D : (i + 1) * D].reshape(-1, D, H, K),
                "b": merged["b"][..., i * D : (i + 1) * D].reshape(-1, H, K),
            }
            for i, name in enumerate("qkv")
        }
        attn["o"] = {"w": o["w"].reshape(-1, H, K, D), "b": o["b"]}
        return {
            "embed": {"w": w["transformer.wte.weight"]},
            "positions": {"w": w["transformer.wpe.weight"]},
            "layers": {
                "attn": attn,
                "attn_norm": norm("ln_1"),
                "mlp_norm": norm("ln_2"),
                "mlp": {"up": layer("mlp.c_fc"), "down": layer("mlp.c_proj")},
            },
            "norm": {"scale": w["transformer.ln_f.weight"], "bias": w["transformer.ln_f.bias"]},
        }
    h, K = "model.layers.{}.", config.head_size
    tree = {
        "embed": {"w": w["model.embed_tokens.weight"]},
        "norm": {"scale": w["model.norm.weight"]},
        "layers": {
            "attn_norm": {"scale": stack(h + "input_layernorm.weight")},
            "mlp_norm": {"scale": stack(h + "post_attention_layernorm.weight")},
            "attn": {
                name: {"w": stack(h + f"self_attn.{name}_proj.weight", lambda x: x.T.reshape(D, -1, K))}
                for name in "qkv"
            },
            "mlp": {name: {"w": stack(h + f"mlp.{name}_proj.weight", np.transpose)} for name in ("gate", "up", "down")},
        },
    }
    tree["layers"]["attn"]["o"] = {"w": stack(h + "self_attn.o_proj.weight", lambda x: x.T.reshape(H, K, D))}
    return tree if config.tied else {**tree, "head": {"w": w["lm_head.weight"]}}


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.integers(0, V // 8, (B, T + 1)).astype(np.int32) * 8  # an eighth of the vocabulary: soon learned
        yield rows[:, :-1], rows[:, 1:]


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_logits_equal_those_of_transformers(config):
    reference, model = theirs(config), jaxmodels.create(config)
    params = ours(config, reference)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())
    tokens = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long()).logits.numpy()
    assert expected.std() > 0.2
    for kernel in ("xla", "blockwise"):
        apply = jax.jit(jaxmodels.create(config, attention=kernel).apply)
        np.testing.assert_allclose(apply(params, tokens), expected, rtol=0, atol=1e-4)


def train_theirs(model, lr, decay):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for tokens, targets in batches():
        logits = model(torch.from_numpy(tokens).long()).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.from_numpy(targets).long().reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def train_ours(config, params, lr, decay):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    task = tasks.build(TaskConfig(), config, DataConfig(seq_len=T, batch_size=B))
    cfg = OptimConfig(
        name="adamw", peak_lr=lr, schedule="constant", b1=0.9, b2=0.95, eps=1e-8, weight_decay=decay, clip_norm=1.0
    )
    optimizers = {loss.name: optim.build(cfg, STEPS, task.axes()[loss.trains]) for loss in task.losses}
    layout = state.layout(task, optimizers, mesh)
    params = jax.tree.map(jnp.asarray, params)
    moments = {loss.name: optimizers[loss.name].init(params) for loss in task.losses}
    now = state.State(jnp.zeros((), jnp.int32), {"model": params}, {}, moments, None, jax.random.key(0))
    now = jax.device_put(now, jax.tree.map(lambda leaf: leaf.sharding, layout))
    rows = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in task.batch_spec(B).items()}
    take = step.build(task, optimizers, mesh, layout, rows)
    losses, norms = [], []
    for tokens, targets in batches():
        batch = {"tokens": tokens, "targets": targets}
        now, metrics = take(now, jax.device_put(batch, rules.batch_sharding(mesh, 2)))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return losses, norms, now.params["model"]


@pytest.mark.parametrize("name", ["gpt2", "llama-1-kv-head", "llama-all-heads-tied"])
def test_twenty_steps_of_adamw_are_those_of_torch(name):
    config, lr, decay = CASES[name], 1e-2, 0.3
    reference = theirs(config)
    losses, norms, end = train_ours(config, ours(config, reference), lr, decay)
    expected, their_norms = train_theirs(reference, lr, decay)
    assert expected[-1] < expected[0] - 1 and max(their_norms) > 2, "learned, and clipped"
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-3)
    np.testing.assert_allclose(norms, their_norms, rtol=1e-2)
    # after 20 steps of 1e-2 each; Adam enlarges rounding where a gradient is nearly 0 (as that of keys' biases)
    wrong = jax.tree.map(lambda a, b: np.mean(np.abs(np.asarray(a) - b) > 2e-3), end, ours(config, reference))
    wrong.get("layers", {}).get("attn", {}).get("k", {}).pop("b", None)
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

"""The same weights give the logits, the router's loss and the gradients that transformers gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.models.mixtral import MixtralConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

V, B, T = 53, 3, 20
BASE = MixtralConfig(vocab_size=V, context=64, layers=2, heads=4, kv_heads=2, width=32, mlp_width=24)
CASES = {
    "8x2": BASE,
    "1-kv-head-window": dataclasses.replace(BASE, kv_heads=1, window=5),
    "5x3-tied": dataclasses.replace(BASE, experts=5, experts_per_token=3, kv_heads=4, head_dim=6, tied=True),
    "3x1": dataclasses.replace(BASE, experts=3, experts_per_token=1),
}


def theirs(config):
    """The model of transformers with these settings and random weights."""
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=V,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_size,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            sliding_window=config.window,
            num_local_experts=config.experts,
            num_experts_per_tok=config.experts_per_token,
            router_aux_loss_coef=config.balance_loss,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )
    for name, p in model.named_parameters():
        spread = 0.2 if p.ndim == 1 else 0.6 if "mlp.gate." in name else 0.15
        p.data = torch.randn_like(p) * spread + float("norm" in name)
    return model.float().eval()


def ours(config, named):
    """Weights (or gradients) of transformers, by name, as our tree."""
    w = {name: p.numpy() for name, p in named.items()}
    D, H, K, F, h = config.width, config.heads, config.head_size, config.mlp_width, "model.layers.{}."

    def stack(name, convert=lambda x: x):
        return np.stack([convert(w[h.format(i) + name]) for i in range(config.layers)])

    fused = np.swapaxes(stack("mlp.experts.gate_up_proj"), -1, -2)  # gate's hidden units, then up's
    tree = {
        "embed": {"w": w["model.embed_tokens.weight"]},
        "norm": {"scale": w["model.norm.weight"]},
        "layers": {
            "attn_norm": {"scale": stack("input_layernorm.weight")},
            "mlp_norm": {"scale": stack("post_attention_layernorm.weight")},
            "attn": {
                **{
                    name: {"w": stack(f"self_attn.{name}_proj.weight", lambda x: x.T.reshape(D, -1, K))}
                    for name in "qkv"
                },
                "o": {"w": stack("self_attn.o_proj.weight", lambda x: x.T.reshape(H, K, D))},
            },
            "moe": {
                "router": {"w": stack("mlp.gate.weight", np.transpose)},
                "gate": {"w": fused[..., :F]},
                "up": {"w": fused[..., F:]},
                "down": {"w": np.swapaxes(stack("mlp.experts.down_proj"), -1, -2)},
            },
        },
    }
    return tree if config.tied else {**tree, "head": {"w": w["lm_head.weight"]}}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    config = CASES[request.param]
    reference = theirs(config)
    params = ours(config, {name: p.detach() for name, p in reference.named_parameters()})
    tokens = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
    return config, reference, params, tokens


def test_logits_and_the_balance_loss_equal_those_of_transformers(case):
    config, reference, params, tokens = case
    model = jaxmodels.create(config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long(), output_router_logits=True)
    assert expected.logits.numpy().std() > 0.2
    logits, losses = jax.jit(lambda p: model.apply(p, tokens, auxiliary=True))(params)
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=0, atol=1e-4)
    assert float(losses["balance_loss"]) == pytest.approx(config.balance_loss * expected.aux_loss.item(), abs=1e-6)
    scores = torch.stack(expected.router_logits)
    assert expected.aux_loss.item() > 1.02 * config.experts_per_token, "the router does not choose all alike"
    z = jaxmodels.create(config, z_loss=0.1).apply(params, tokens, auxiliary=True)[1]["router_z_loss"]
    assert float(z) == pytest.approx(0.1 * torch.logsumexp(scores, -1).square().mean().item(), rel=1e-5)


def test_padding_is_left_out_of_logits_and_loss_as_by_transformers(case):
    config, reference, params, tokens = case
    real = (np.arange(T) < np.array([T, 13, 6])[:, None]).astype(np.int32)
    with torch.no_grad():
        mask = torch.from_numpy(real).long()
        expected = reference(torch.from_numpy(tokens).long(), attention_mask=mask, output_router_logits=True)
    model = jaxmodels.create(config)
    logits, losses = jax.jit(lambda p: model.apply(p, tokens, segment_ids=real, auxiliary=True))(params)
    there = real.astype(bool)
    np.testing.assert_allclose(np.asarray(logits)[there], expected.logits.numpy()[there], rtol=0, atol=1e-4)
    assert float(losses["balance_loss"]) == pytest.approx(config.balance_loss * expected.aux_loss.item(), abs=1e-6)
    everywhere = jax.jit(lambda p: model.apply(p, tokens, auxiliary=True))(params)[1]
    assert abs(float(everywhere["balance_loss"]) - float(losses["balance_loss"])) > 1e-5


def test_gradients_equal_those_of_torch(case):
    config, reference, params, tokens = case
    reference.zero_grad()
    out = reference(torch.from_numpy(tokens).long(), output_router_logits=True)
    scores = torch.log_softmax(out.logits[:, :-1], -1)
    picked = scores.gather(-1, torch.from_numpy(tokens[:, 1:, None]).long())
    (-picked.mean() + config.balance_loss * out.aux_loss).backward()
    expected = ours(config, {name: p.grad for name, p in reference.named_parameters()})
    model = jaxmodels.create(config)

    def loss(params):
        logits, losses = model.apply(params, tokens, auxiliary=True)
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], -1).mean() + losses["balance_loss"]

    def compare(path, got, want):
        assert np.abs(want).max() > 1e-4, path
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1.0, float(np.abs(want).max())))

    jax.tree_util.tree_map_with_path(compare, jax.jit(jax.grad(loss))(params), expected)

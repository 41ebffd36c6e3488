"""The encoder-decoder gives the logits and gradients of torch.nn.Transformer, and of transformers' T5."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.models.families import family
from jaxmodels.models.transformer import TransformerConfig, bucket

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

V, B, S, T = 97, 3, 57, 53  # long enough for blocks of attention
ORIGINAL = TransformerConfig(
    vocab_size=V, layers=2, decoder_layers=3, heads=3, width=18, mlp_width=29, norm_eps=1e-5, dropout=0.0
)
T5 = dataclasses.replace(ORIGINAL, variant="t5", norm="pre", norm_eps=1e-6, width=20, head_dim=7)
CASES = {
    "post": ORIGINAL,
    "pre": dataclasses.replace(ORIGINAL, norm="pre", activation="gelu", layers=3, decoder_layers=None),
    "t5": T5,
    "t5-v1.1": dataclasses.replace(
        T5, activation="gated_gelu", tied=False, relative_buckets=18, relative_distance=21, layers=1, decoder_layers=2
    ),
}


class Original(torch.nn.Module):
    """torch's own encoder and decoder between shared embeddings and sinusoids."""

    def __init__(self, c):
        super().__init__()
        nn = torch.nn
        gelu = functools.partial(nn.functional.gelu, approximate="tanh")
        options = {
            "dropout": 0.0,
            "activation": gelu if c.activation == "gelu" else "relu",
            "layer_norm_eps": c.norm_eps,
            "batch_first": True,
            "norm_first": c.norm == "pre",
        }
        sizes = (c.width, c.heads, c.mlp_width)

        def last():  # the paper's has none after the last block, torch's default has
            return nn.LayerNorm(c.width, c.norm_eps) if c.norm == "pre" else None

        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*sizes, **options), c.layers, last(), enable_nested_tensor=False
        )
        decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(*sizes, **options), c.decoder_layers or c.layers, last()
        )
        self.body = nn.Transformer(*sizes[:2], custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
        self.table = nn.Embedding(c.vocab_size, c.width)
        self.width = c.width

    def embed(self, tokens):
        wave = np.zeros((tokens.shape[1], self.width), np.float32)
        for t in range(tokens.shape[1]):
            for i in range(self.width):
                angle = t / 10000 ** (2 * (i // 2) / self.width)
                wave[t, i] = math.cos(angle) if i % 2 else math.sin(angle)
        return self.table(tokens) * math.sqrt(self.width) + torch.from_numpy(wave)

    def forward(self, inputs, targets, mask, target_mask):
        length = targets.shape[1]
        y = self.body(
            self.embed(inputs),
            self.embed(targets),
            tgt_mask=torch.ones(length, length).triu(1).bool(),
            src_key_padding_mask=~mask,
            memory_key_padding_mask=~mask,
            tgt_key_padding_mask=~target_mask,
        )
        return y @ self.table.weight.T


def theirs(c):
    """The reference with these settings and random weights, none of which is 0 or 1."""
    torch.manual_seed(0)
    if not c.t5:
        model = Original(c)
    else:
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=V,
                d_model=c.width,
                d_kv=c.head_size,
                d_ff=c.mlp_width,
                num_layers=c.layers,
                num_decoder_layers=c.decoder_layers,
                num_heads=c.heads,
                relative_attention_num_buckets=c.relative_buckets,
                relative_attention_max_distance=c.relative_distance,
                dropout_rate=0.0,
                layer_norm_epsilon=c.norm_eps,
                feed_forward_proj={"relu": "relu", "gated_gelu": "gated-gelu"}[c.activation],
                tie_word_embeddings=c.tied,
                attn_implementation="eager",
            )
        )
        if not c.tied:  # transformers ties them again, whatever it is told; published weights are untied
            model.lm_head.weight = torch.nn.Parameter(torch.randn(V, c.width))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data = torch.randn_like(p) * 0.2 + ("norm" in name and name.endswith("weight"))
        elif "relative" in name:
            p.data = torch.randn_like(p)
    return model.eval()


def logits_of(c, reference, inputs, targets, mask, target_mask):
    arrays = [torch.from_numpy(np.asarray(x)) for x in (inputs, targets, mask, target_mask)]
    if not c.t5:
        return reference(arrays[0].long(), arrays[1].long(), arrays[2], arrays[3])
    return reference(
        input_ids=arrays[0].long(),
        decoder_input_ids=arrays[1].long(),
        attention_mask=arrays[2],
        decoder_attention_mask=arrays[3],
    ).logits


def ours(c, w):
    """The reference's arrays by name, as a tree of ours."""
    D, H, K = c.width, c.heads, c.head_size

    def stack(depth, get):
        return jax.tree.map(lambda *xs: np.stack(xs), *(get(i) for i in range(depth)))

    def linear(name, shape):
        made = {"w": w[f"{name}.weight"].T.reshape(shape)}
        return made if c.t5 else {**made, "b": w[f"{name}.bias"].reshape(shape[-1:])}

    def scale(name):
        return {"scale": w[f"{name}.weight"]} if c.t5 else {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

    def attention(name):
        if c.t5:
            return {x: {"w": w[f"{name}.{x}.weight"].T.reshape(D, H, K)} for x in "qkv"} | {
                "o": linear(f"{name}.o", (H, K, D))
            }
        parts = zip(
            "qkv", np.split(w[f"{name}.in_proj_weight"], 3), np.split(w[f"{name}.in_proj_bias"], 3), strict=True
        )
        made = {x: {"w": a.T.reshape(D, H, K), "b": b.reshape(H, K)} for x, a, b in parts}
        return made | {"o": linear(f"{name}.out_proj", (H, K, D))}

    def stackwise(side, depth):
        decoder = side == "decoder"
        subs = ("attn", "cross", "mlp") if decoder else ("attn", "mlp")

        def t5(i):
            found = {}
            for j, sub in enumerate(subs):
                h = f"{side}.block.{i}.layer.{j}."
                found[f"{sub}_norm"] = scale(h + "layer_norm")
                if sub == "mlp":
                    names = {"up": "wi", "down": "wo"}
                    names = names if c.activation == "relu" else {"gate": "wi_0", "up": "wi_1", "down": "wo"}
                    found[sub] = {a: {"w": w[f"{h}DenseReluDense.{b}.weight"].T} for a, b in names.items()}
                else:
                    found[sub] = attention(h + ("SelfAttention" if sub == "attn" else "EncDecAttention"))
            return found

        def original(i):
            h = f"body.{side}.layers.{i}."
            found = {f"{sub}_norm": scale(f"{h}norm{j + 1}") for j, sub in enumerate(subs)}
            found["attn"] = attention(h + "self_attn")
            if decoder:
                found["cross"] = attention(h + "multihead_attn")
            F = c.mlp_width
            return {**found, "mlp": {"up": linear(h + "linear1", (D, F)), "down": linear(h + "linear2", (F, D))}}

        made = {"layers": stack(depth, t5 if c.t5 else original)}
        if c.norm == "pre":
            made["norm"] = scale(f"{side}.final_layer_norm" if c.t5 else f"body.{side}.norm")
        if c.t5:
            made["relative"] = {"w": w[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]}
        return made

    tree = {
        "embed": {"w": w["shared.weight" if c.t5 else "table.weight"]},
        "encoder": stackwise("encoder", c.layers),
        "decoder": stackwise("decoder", c.decoder_layers or c.layers),
    }
    return tree if c.tied else {**tree, "head": {"w": w["lm_head.weight"]}}


def arrays(reference, what="data"):
    return {name: getattr(p, what).numpy() for name, p in reference.named_parameters()}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    c = CASES[request.param]
    reference = theirs(c)
    rng = np.random.default_rng(1)
    inputs, targets = (rng.integers(0, V, (B, n)).astype(np.int32) for n in (S, T))
    mask = np.arange(S) < np.array([S, 31, 2])[:, None]
    target_mask = np.arange(T) < np.array([5, T, 40])[:, None]
    expected = logits_of(c, reference, inputs, targets, mask, target_mask)
    weight = torch.from_numpy((rng.normal(size=(B, T, V)) * target_mask[..., None]).astype(np.float32))
    (expected * weight).sum().backward()
    batch = (jnp.asarray(inputs), jnp.asarray(targets))
    ids = {"segment_ids": jnp.asarray(mask, jnp.int32), "target_segment_ids": jnp.asarray(target_mask, jnp.int32)}
    return c, reference, batch, ids, target_mask, expected.detach().numpy(), weight.numpy()


@pytest.mark.parametrize("kernel", ["xla", "blockwise"])
def test_logits_and_gradients_equal_the_references(case, kernel):
    c, reference, batch, ids, real, expected, weight = case
    model = jaxmodels.create(c, attention=kernel)
    params = ours(c, arrays(reference))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.shapes())

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        logits = model.apply(params, *batch, **ids)
        return (logits * weight).sum(), logits

    (_, logits), grads = run(params)
    assert expected[real].std() > 0.2
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], rtol=0, atol=1e-4)

    def same(path, got, want):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        error, size = np.abs(np.asarray(got) - want).max(), np.abs(want).max()
        # keys' biases add the same to all of a query's scores, so softmax does not see them
        assert error < (1e-3 if name.endswith("k/b") else 1e-4 * size), (name, error, size)

    jax.tree_util.tree_map_with_path(same, grads, ours(c, arrays(reference, "grad")))


@pytest.mark.parametrize("case", ["t5", "t5-v1.1"], indirect=True)
def test_the_encoder_alone_is_transformers_encoder(case):
    c, reference, batch, ids, *_ = case
    tokens, mask = (torch.from_numpy(np.array(x)).long() for x in (batch[0], ids["segment_ids"]))
    with torch.no_grad():
        expected = reference.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state.numpy()
    params = ours(c, arrays(reference))
    memory = jax.jit(jaxmodels.create(c).apply)(params, batch[0], None, segment_ids=ids["segment_ids"])
    real = np.asarray(ids["segment_ids"]) == 1
    np.testing.assert_allclose(np.asarray(memory)[real], expected[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("both", [True, False])
def test_buckets_of_distances_are_t5s(both):
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    for buckets, distance in ((32, 128), (18, 21), (7, 12), (4, 500), (64, 100)):
        apart = torch.arange(-2 * distance, 2 * distance + 1)
        expected = theirs(apart, bidirectional=both, num_buckets=buckets, max_distance=distance).numpy()
        table = bucket(buckets, distance, both)
        np.testing.assert_array_equal(table[apart.clip(-distance, distance).numpy() + distance], expected)


@pytest.mark.parametrize("name", [name for name in family("transformer").presets if name.startswith("t5")])
def test_published_t5s_have_transformers_number_of_parameters(name):
    c = family("transformer").presets[name]
    config = transformers.T5Config(
        vocab_size=c.vocab_size,
        d_model=c.width,
        d_kv=c.head_size,
        d_ff=c.mlp_width,
        num_layers=c.layers,
        num_heads=c.heads,
        feed_forward_proj={"relu": "relu", "gated_gelu": "gated-gelu"}[c.activation],
    )
    with torch.device("meta"):
        reference = transformers.T5ForConditionalGeneration(config)
    expected = sum(p.numel() for p in reference.parameters())
    # version 1.1 is published with an output layer of its own, which transformers makes one with the embedding
    assert jaxmodels.create(c).count() == expected + (0 if c.tied else c.vocab_size * c.width)


@pytest.mark.parametrize("name", ["post", "t5"])
def test_initial_deviations_are_the_references(name):
    c = dataclasses.replace(CASES[name], width=96, head_dim=20 if CASES[name].t5 else None, mlp_width=128)
    torch.manual_seed(0)
    if c.t5:
        config = transformers.T5Config(
            vocab_size=V, d_model=c.width, d_kv=20, d_ff=128, num_layers=2, num_decoder_layers=3, num_heads=3
        )
        reference = transformers.T5ForConditionalGeneration(config)
    else:
        reference = Original(c)
    expected = ours(c, arrays(reference))
    params = jax.jit(jaxmodels.create(c).init)(jax.random.key(0))

    def same(path, got, want):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name == "embed/w" and not c.t5:  # torch.nn.Transformer has no embedding
            assert np.std(got) == pytest.approx(c.width**-0.5, rel=0.05)
        elif not name.endswith("w"):  # torch draws biases of the MLP at random
            np.testing.assert_array_equal(got, name.endswith("scale"))
        else:
            assert np.std(got) == pytest.approx(np.std(want), rel=0.2 if "relative" in name else 0.05), name
            if not c.t5:  # uniform, within the bound
                assert np.abs(got).max() == pytest.approx(np.abs(want).max(), rel=0.02), name

    jax.tree_util.tree_map_with_path(same, params, expected)

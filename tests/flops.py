"""Model FLOPs derived by hand, to compare counts with."""

from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.mixtral import MixtralConfig

GPT2 = GPT2Config(layers=2, width=24, heads=3, vocab_size=37, context=16)
LLAMA = LlamaConfig(layers=2, width=24, heads=6, kv_heads=2, head_dim=8, mlp_width=40, vocab_size=37)
MIXTRAL = MixtralConfig(
    layers=2, width=24, heads=6, kv_heads=2, head_dim=8, mlp_width=40, vocab_size=37, experts=5, experts_per_token=3
)
B, T = 2, 10


def gpt2_by_hand(c, T=T):
    D, F = c.width, c.mlp_width or 4 * c.width
    weights = 4 * D * D + 2 * D * F
    return B * (c.layers * (2 * T * weights + 4 * T * T * D) + 2 * T * D * c.vocab_size)


def llama_by_hand(c, T=T):
    D, F, q, kv = c.width, c.mlp_width, c.heads * c.head_size, (c.kv_heads or c.heads) * c.head_size
    weights = 2 * D * q + 2 * D * kv + 3 * D * F
    return B * (c.layers * (2 * T * weights + 4 * T * T * q) + 2 * T * D * c.vocab_size)

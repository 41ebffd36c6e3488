"""The families of the zoo in PyTorch, eager: transformers' own models where it has them, else plain modules.

`build` gives what a worker of the benchmark runs: `forward`, the model alone, and `train`, a step of AdamW.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Batch = Mapping[str, torch.Tensor]
Run = Callable[[], Any]


def mlp(c: Any) -> nn.Module:
    """Flattened inputs, relu."""
    sizes = [math.prod(c.input_shape), *c.hidden]
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], c.classes))


def cnn(c: Any) -> nn.Module:
    """Convolution, relu, pooling; then hidden layers."""
    height, width, channels = c.input_shape
    parts: list[nn.Module] = []
    for features in c.widths:
        parts += [nn.Conv2d(channels, features, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        height, width, channels = height // 2, width // 2, features
    sizes = [height * width * channels, *c.hidden]
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts, nn.Flatten(), *hidden, nn.Linear(sizes[-1], c.classes))


def vgg(c: Any) -> nn.Module:
    """As torchvision has it, without its adaptive pooling."""
    height, width, channels = c.input_shape
    parts: list[nn.Module] = []
    for depth, features in zip(c.depths, c.widths, strict=True):
        for _ in range(depth):
            parts.append(nn.Conv2d(channels, features, 3, padding=1))
            parts += [nn.BatchNorm2d(features)] if c.batch_norm else []
            parts.append(nn.ReLU(inplace=True))
            channels = features
        parts.append(nn.MaxPool2d(2))
        height, width = height // 2, width // 2
    sizes = [height * width * channels, *c.hidden]
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU(inplace=True))]
    return nn.Sequential(*parts, nn.Flatten(), *hidden, nn.Linear(sizes[-1], c.classes))


class LSTM(nn.Module):
    """Embedding, `nn.LSTM`, output layer."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.lstm = nn.LSTM(c.width, c.hidden, c.layers, batch_first=True)
        self.head = nn.Linear(c.hidden, c.vocab_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


class Seq2Seq(nn.Module):
    """`nn.Transformer` between shared embeddings."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.body = nn.Transformer(
            c.width, c.heads, c.layers, c.decoder_layers or c.layers, c.mlp_width, c.dropout, batch_first=True
        )

    def forward(self, inputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x, y = (self.embed(ids) + self.places(ids) for ids in (inputs, tokens))
        return F.linear(self.body(x, y, tgt_mask=causal, tgt_is_causal=True), self.embed.weight)

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        width = self.embed.embedding_dim
        angle = torch.arange(ids.shape[1])[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        return torch.cat([angle.sin(), angle.cos()], -1)


class VAE(nn.Module):
    """One hidden layer to each side."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        pixels = math.prod(c.input_shape)
        sizes = [pixels, *c.hidden]
        pairs = list(itertools.pairwise(sizes))
        self.encoder = nn.Sequential(*[part for a, b in pairs for part in (nn.Linear(a, b), nn.ReLU())])
        self.code = nn.Linear(sizes[-1], 2 * c.latents)
        back = list(zip([c.latents, *sizes[:0:-1]], sizes[:0:-1], strict=False))
        self.decoder = nn.Sequential(
            *[part for a, b in back for part in (nn.Linear(a, b), nn.ReLU())], nn.Linear(sizes[1], pixels)
        )

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = self.code(self.encoder(images.flatten(1))).chunk(2, -1)
        z = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
        return self.decoder(z), mean, log_variance


class GAN(nn.Module):
    """DCGAN's generator and discriminator."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        height, width, colors = c.input_shape
        times = 2 ** len(c.channels)
        self.first = (c.channels[-1], height // times, width // times)
        self.project = nn.Linear(c.latents, math.prod(self.first), bias=False)
        up: list[nn.Module] = []
        down: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(c.channels[::-1], (*c.channels[-2::-1], colors), strict=True)):
            last = i == len(c.channels) - 1
            up += [nn.BatchNorm2d(a), nn.ReLU(), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=last)]
        for i, (a, b) in enumerate(zip((colors, *c.channels), c.channels, strict=False)):
            down.append(nn.Conv2d(a, b, 4, 2, 1, bias=i == 0))
            down += [nn.BatchNorm2d(b)] if i else []
            down.append(nn.LeakyReLU(0.2))
        self.up = nn.Sequential(*up, nn.Tanh())
        self.discriminator = nn.Sequential(*down, nn.Flatten(), nn.Linear(math.prod(self.first), 1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.up(self.project(z).view(-1, *self.first))


def published(config: Any) -> nn.Module:
    """The model of transformers that a config of ours describes."""
    import transformers

    from jaxmodels import hf
    from jaxmodels.models.families import family_of

    settings = hf.format_of(family_of(config).name).describe(config)
    (architecture,) = settings.pop("architectures")
    kind = transformers.AutoConfig.for_model(**settings)
    return getattr(transformers, architecture)._from_config(kind)


PLAIN = {"mlp": mlp, "cnn": cnn, "vgg": vgg, "lstm": LSTM, "vae": VAE, "gan": GAN}


def build(size: Any, batch: Mapping[str, np.ndarray], inputs: tuple[np.ndarray, ...]) -> dict[str, Run]:
    """Runs of a size of the zoo on a batch; `inputs` are what the model alone takes of it."""
    from jaxmodels.models.families import family_of

    torch.manual_seed(0)
    config = size.config
    family = family_of(config).name
    original = family == "transformer" and not config.t5
    model = Seq2Seq(config) if original else PLAIN[family](config) if family in PLAIN else published(config)
    data = {name: tensor(x) for name, x in batch.items()}
    given = tuple(tensor(x) for x in inputs)
    losses = objectives(size, family, model, data)
    optimizers = [torch.optim.AdamW(part.parameters(), 1e-3, weight_decay=0.1) for _, part in losses]

    @torch.inference_mode()
    def forward() -> Any:
        model.eval()
        return call(family, original, model, given)

    def train() -> None:
        model.train()
        for (loss, _), optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            value = loss()
            value.backward()
            optimizer.step()
            value.item()

    return {"forward": forward, "train": train}


def tensor(x: np.ndarray) -> torch.Tensor:
    """Images with their channels first, and token ids as torch counts them."""
    found = torch.from_numpy(np.ascontiguousarray(x))
    if found.ndim == 4:
        found = found.permute(0, 3, 1, 2).contiguous()
    return found.long() if not found.is_floating_point() else found


def call(family: str, original: bool, model: nn.Module, given: tuple[torch.Tensor, ...]) -> Any:
    """The model's outputs."""
    if family == "clip":
        return model(pixel_values=given[0], input_ids=given[1])
    if family == "transformer" and not original:
        return model(input_ids=given[0], decoder_input_ids=given[1], use_cache=False).logits
    if family in ("gpt2", "llama", "mixtral"):
        return model(given[0], use_cache=False).logits
    out = model(*given)
    return getattr(out, "logits", out)


def objectives(size: Any, family: str, model: Any, data: Batch) -> list[tuple[Callable[[], torch.Tensor], nn.Module]]:
    """Losses in order, each with what it trains."""
    original = family == "transformer" and not size.config.t5
    if size.task == "gan":
        images, ones = 2 * data["inputs"] - 1, F.softplus

        def latents() -> torch.Tensor:
            return torch.randn(len(images), size.config.latents)

        def discriminator() -> torch.Tensor:
            fake = model(latents()).detach()
            return ones(-model.discriminator(images)).mean() + ones(model.discriminator(fake)).mean()

        generator = nn.ModuleList([model.project, model.up])
        return [
            (discriminator, model.discriminator),
            (lambda: ones(-model.discriminator(model(latents()))).mean(), generator),
        ]
    if size.task == "vae":

        def bound() -> torch.Tensor:
            logits, mean, log_variance = model(data["inputs"])
            pixels = F.binary_cross_entropy_with_logits(logits, data["inputs"].flatten(1), reduction="sum")
            kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum()
            return (pixels + kl) / len(logits)

        return [(bound, model)]
    if size.task == "contrastive":
        given = {"pixel_values": data["images"], "input_ids": data["tokens"], "return_loss": True}
        return [(lambda: model(**given).loss, model)]
    if size.task == "seq2seq":
        pair, targets = (data["inputs"], data["tokens"]), data["targets"]
    elif size.task == "masked_lm":
        tokens = data["tokens"]
        pair, targets = (tokens,), torch.where(torch.rand(tokens.shape) < 0.15, tokens, -100)
    else:
        pair = (data["tokens"] if "tokens" in data else data["inputs"],)
        targets = data["targets"] if "targets" in data else data["labels"]

    def cross_entropy() -> torch.Tensor:
        logits = call(family, original, model, pair)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    return [(cross_entropy, model)]

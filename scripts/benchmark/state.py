"""What is saved: a decoder, AdamW, an average of the weights and the best ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn
from torch.nn import functional

LAYERS = 12


@dataclass(frozen=True)
class Size:
    """How large the decoder is.

    Attributes:
        width: of its layers.
        words: in its vocabulary.
    """

    width: int
    words: int


SIZES = {"tiny": Size(32, 64), "10m": Size(256, 2048), "98m": Size(768, 16384)}


class Block(nn.Module):
    """Attention and a layer of four times the width, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, time, width) to the same shape."""
        heads = [
            part.unflatten(-1, (-1, 32)).transpose(1, 2)
            for part in self.attention(self.norms[0](x)).chunk(3, -1)
        ]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(-2))
        return x + self.narrow(functional.gelu(self.widen(self.norms[1](x))))


class Decoder(nn.Module):
    """A language model as small ones are: `LAYERS` blocks between one embedding, twice used."""

    def __init__(self, size: Size, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.words, size.width)
        self.place = nn.Embedding(256, size.width)
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(layers))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Map words (batch, time) to scores (batch, time, words)."""
        x = self.embed(words) + self.place.weight[: words.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.embed.weight)


@dataclass
class World:
    """The live objects of a training run; a save takes all of them.

    Attributes:
        model: what is trained.
        optimizer: its AdamW, after an update.
        ema: averages by key of the model's state.
        best: best weights by key of the model's state.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all tensors, by part and name."""
        for name, value in self.model.state_dict().items():
            yield f"model.{name}", value
        names = {id(one): name for name, one in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield f"optimizer.{names[id(parameter)]}.{name}", value
        for part, values in (("ema", self.ema), ("best", self.best)):
            for name, value in values.items():
                yield f"{part}.{name}", value

    @property
    def nbytes(self) -> int:
        """Bytes of the whole state."""
        return sum(value.nbytes for _, value in self.tensors())

    @torch.no_grad()
    def change(self, parts: str = "model optimizer ema best") -> int:
        """Change all tensors of some parts that are trained; return how many bytes these are."""
        trained = {name for name, one in self.model.named_parameters() if one.requires_grad}
        changed = 0
        for name, value in self.tensors():
            part, _, rest = name.partition(".")
            if part == "optimizer":
                rest = rest.rpartition(".")[0]
            if part in parts.split() and rest in trained:
                local = getattr(value, "_local_tensor", value)
                local.add_(1e-3)
                changed += value.nbytes
        return changed

    @torch.no_grad()
    def wipe(self) -> None:
        """Set everything to zero."""
        for _, value in self.tensors():
            getattr(value, "_local_tensor", value).zero_()

    def digests(self) -> dict[str, str]:
        """Digest of each tensor."""
        return {name: _digest(value) for name, value in self.tensors()}


def _digest(value: Any) -> str:
    local = getattr(value, "_local_tensor", value)
    return xxhash.xxh3_64_hexdigest(local.detach().contiguous().view(-1).view(torch.uint8).numpy())


def make_model(size: str, trained: str = "all") -> Decoder:
    """Return a decoder.

    Args:
        size: one of `SIZES`.
        trained: `all`, or `last` for two layers of the last block, about 5 %; all else is frozen.
    """
    torch.manual_seed(0)
    model = Decoder(SIZES[size])
    if trained == "last":
        model.requires_grad_(False)
        model.blocks[-1].widen.requires_grad_(True)
        model.blocks[-1].narrow.requires_grad_(True)
    return model


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return an AdamW of what is trained, after a first update."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    step(optimizer)
    return optimizer


def step(optimizer: torch.optim.Optimizer) -> None:
    """Make an update with gradients that cost nothing to compute; they are gone afterwards."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()


def make_world(size: str, trained: str = "all") -> World:
    """Return the whole state, as plain objects of torch."""
    model = make_model(size, trained)
    optimizer = make_optimizer(model)
    copies = [{k: v.clone() for k, v in model.state_dict().items()} for _ in range(2)]
    return World(model, optimizer, *copies)

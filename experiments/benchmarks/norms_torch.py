"""The PyTorch peers of `norms.py`, in an environment of their own: Opacus (ghost norms) and BackPACK.

Command     python norms_torch.py MODEL BATCH REPEATS
            in an environment with torch, opacus and backpack-for-pytorch; prints one line of JSON. `norms.py` calls it.
Result      each peer's time in its own ordinary gradients; why, where it refuses
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    def __init__(self, inside: int, width: int, stride: int):
        super().__init__()
        self.one = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.skip = nn.Identity()
        if stride > 1 or inside != width:
            self.skip = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.GroupNorm(8, width))

    def forward(self, x):
        y = F.relu(self.norms[0](self.one(x)))
        return F.relu(self.skip(x) + self.norms[1](self.two(y)))


class Pool(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class Block(nn.Module):
    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.causal, self.heads = causal, width // 64
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkvo = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        normed = self.norms[0](x)
        q, k, v = (m(normed).unflatten(-1, (self.heads, 64)).transpose(1, 2) for m in list(self.qkvo)[:3])
        scores = q @ k.transpose(-1, -2) / 8
        if self.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        x = x + self.qkvo[3]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Positions(nn.Module):
    """A learned offset for each place, as an embedding, for which the peers have a rule."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.table = nn.Embedding(count, width)

    def forward(self, x):
        return x + self.table(torch.arange(x.shape[1]).repeat(x.shape[0], 1))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.positions = nn.Conv2d(3, 192, 4, 4), Positions(64, 192)
        self.blocks = nn.Sequential(*(Block(192, False) for _ in range(6)))
        self.norm, self.head = nn.LayerNorm(192), nn.Linear(192, 10)

    def forward(self, x):
        x = self.positions(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(self.blocks(x)).mean(1))


class GPT(nn.Module):
    """Embedding and last layer are not tied here: the peers' norms of tied weights leave the cross terms out."""

    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Embedding(4096, 256), Positions(64, 256)
        self.blocks = nn.Sequential(*(Block(256, True) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(256), nn.Linear(256, 4096, bias=False)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.positions(self.embed(x))))).transpose(1, 2).contiguous()


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10))


def residual() -> nn.Module:
    sizes = [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    head = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.GroupNorm(8, 32), nn.ReLU()]
    return nn.Sequential(*head, *(Residual(*size) for size in sizes), Pool(), nn.Linear(128, 10))


def dense() -> nn.Module:
    sizes = (3072, 2048, 2048, 2048, 2048)
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(2048, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (dense, (3072,)),
    "cnn": (convolutional, (1, 28, 28)),
    "resnet": (residual, (3, 32, 32)),
    "vit": (ViT, (3, 32, 32)),
    "gpt": (GPT, ()),
}


def data(name: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    if name == "gpt":
        tokens = torch.randint(4096, (size, 65))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return torch.randn(size, *MODELS[name][1]), torch.randint(10, (size,))


def ordinary(name: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    model = MODELS[name][0]()

    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return run


def opacus(name: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model = GradSampleModuleFastGradientClipping(MODELS[name][0](), max_grad_norm=1.0, use_ghost_clipping=True)

    def run() -> torch.Tensor:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        return model.get_norm_sample()

    return run


def backpack(name: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    from backpack import backpack as extended
    from backpack import extend
    from backpack.extensions import BatchL2Grad

    model, loss = extend(MODELS[name][0](), use_converter=name not in ("mlp", "cnn")), extend(nn.CrossEntropyLoss())

    def run() -> torch.Tensor:
        model.zero_grad()
        with extended(BatchL2Grad()):
            loss(model(x), y).backward()
        return sum(p.batch_l2 for p in model.parameters()).sqrt()

    return run


def main() -> None:
    name, size, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    x, y = data(name, size)
    runs, left_out = {"ordinary": ordinary(name, x, y)}, {}
    for label, peer in (("Opacus", opacus), ("BackPACK", backpack)):
        try:
            runs[label] = peer(name, x, y)
            runs[label]()
        except Exception as error:  # a refusal is a result
            runs.pop(label, None)
            left_out[label] = f"refused: {type(error).__name__}: {(str(error) or 'no reason').splitlines()[0][:80]}"
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(repeats):
        for label, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[label].append(time.perf_counter() - start)
    base = statistics.median(seconds.pop("ordinary"))
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    ways = {label: {"seconds": took, "ratio": took / base} for label, took in medians.items()}
    print(json.dumps({"ways": ways, "left_out": left_out}))


if __name__ == "__main__":
    main()

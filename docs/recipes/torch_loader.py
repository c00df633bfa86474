"""Hugging Face datasets, a torch `DataLoader` with workers, and a torch model."""

import sys
from pathlib import Path

import datasets
import isgd_jax as isgd
import jax
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

digits = load_digits()
columns = {"x": (digits.data / 16.0).tolist(), "y": digits.target.tolist()}
columns["index"] = list(range(len(digits.target)))
WORKERS, PREFETCH = 2, 2


def train(folder, num_steps):
    torch.manual_seed(0)
    dataset = datasets.Dataset.from_dict(columns).with_format("torch")
    layers = torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    sampler = isgd.importance_sampler(len(dataset), batch_size=64)
    draws = isgd.loaders.index_sampler(
        sampler, key=jax.random.key(1), ahead=WORKERS * PREFETCH + 1
    )
    file = Path(folder) / "all.pt"
    if file.exists():
        saved = torch.load(file, weights_only=False)  # NumPy arrays, in a file of yours
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        draws.load_state_dict(saved["draws"])
    loader = DataLoader(
        dataset,
        batch_sampler=draws.lists(),
        num_workers=WORKERS,
        prefetch_factor=PREFETCH,
        multiprocessing_context="spawn",  # JAX has threads: a fork could hang
    )
    for batch in loader:
        drawn = draws.listed(batch["index"])
        logits = model(batch["x"])
        losses = torch.nn.functional.cross_entropy(logits, batch["y"], reduction="none")
        loss = (torch.from_numpy(drawn.weights) * losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # the gradient of each loss by its logits
            wrong = logits.softmax(1) - torch.nn.functional.one_hot(batch["y"], 10)
        draws.observe(drawn, scores=wrong.norm(dim=1).numpy())
        if drawn.step + 1 == num_steps:
            break
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved | {"draws": draws.state_dict()}, file)
    print(f"step {num_steps}, loss {loss:.3f}\n{draws.report()}")
    return saved | {"draws": draws.state_dict()}


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))

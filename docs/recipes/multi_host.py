"""Several processes train as one; each loads its own part of the same draws.

Run one a host: `python multi_host.py FOLDER STEPS ADDRESS COUNT NUMBER`, with process
0's address, or on this machine `... 127.0.0.1:8476 2 0 & ... 127.0.0.1:8476 2 1`.
"""

import hashlib
import pickle
import sys
from functools import partial
from pathlib import Path

import isgd_jax as isgd
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils as multihost
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

digits = load_digits()
data = {"x": (digits.data / 16.0).astype(np.float32), "y": digits.target}
N = len(data["y"])
tx = optax.chain(isgd.importance_weighting(N), optax.adamw(1e-3))
sampler = isgd.importance_sampler(N, batch_size=64)


def loss_fn(params, example):
    logits = example["x"] @ params
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


@jax.jit
def train_step(params, opt_state, probs, batch):
    grads = isgd.per_example_grads(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, probs=probs)
    return optax.apply_updates(params, updates), opt_state, isgd.norms(grads)


def train(folder, num_steps):
    place, count = jax.process_index(), jax.process_count()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = partial(multihost.host_local_array_to_global_array, global_mesh=mesh)
    local = partial(multihost.global_array_to_host_local_array, global_mesh=mesh)
    gather = partial(multihost.process_allgather, tiled=True)
    draws = isgd.loaders.index_sampler(
        sampler, key=jax.random.key(1), shard=(place, count), gather=gather
    )
    params, file = jnp.zeros((64, 10)), Path(folder) / "all"
    run = params, tx.init(params)
    if file.exists():  # each process reads the same file
        run, saved = pickle.loads(file.read_bytes())
        draws.load_state_dict(saved)
    run = spread(run, pspecs=P())
    for drawn in draws:
        mine = {name: x[drawn.indices] for name, x in data.items()}  # or read files
        *run, norms = train_step(*run, *spread((drawn.probs, mine), pspecs=P("data")))
        draws.observe(drawn, norms=local(norms, pspecs=P("data")))
        if drawn.step + 1 == num_steps:
            break
    everything = jax.device_get(local(tuple(run), pspecs=P())), draws.state_dict()
    written = pickle.dumps(everything)
    if place == 0:
        file.write_bytes(written)
    print(f"{place} of {count}: step {num_steps}, {hashlib.sha1(written).hexdigest()}")


if __name__ == "__main__":
    jax.distributed.initialize(sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    train(sys.argv[1], int(sys.argv[2]))

"""Trains the MLP on a mesh of devices and prints the loss of each step.

Run as a script it is one process of several (``jax.distributed``), or the only one.
"""

import argparse
import functools
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import compat
import haiku_mlp

FIELDS = {"hidden_dims": (8, 12, 4), "use_output_bias": True, "hidden_activations": jnp.tanh}
X = np.random.default_rng(0).normal(size=(16, 6))
Y = np.sin(X).sum(axis=-1)
OPTIMISER = optax.adam(0.01)


class Face(NamedTuple):
    """What a training loop needs of a model."""

    init: Callable[..., Any]
    apply: Callable[..., jax.Array]
    specs: Callable[[Any], Any]


def haiku_face() -> Face:
    net = hk.without_apply_rng(hk.transform(lambda x: haiku_mlp.MLP(**FIELDS)(x)))
    return Face(net.init, net.apply, haiku_mlp.partition_specs)


def flax_face() -> Face:
    """The same with the same initial weights."""
    haiku = haiku_face()

    def specs(variables: Any) -> Any:
        params, _ = compat.to_haiku(variables)
        return compat.to_flax(haiku_mlp.partition_specs(params))

    return Face(
        init=lambda *args: compat.to_flax(haiku.init(*args)),
        apply=compat.MLP(**FIELDS).apply,
        specs=specs,
    )


FACES = {"haiku": haiku_face, "flax": flax_face}


def make_mesh(data: int, model: int, kind: AxisType = AxisType.Auto) -> Mesh:
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"), axis_types=(kind, kind))


def shardings(face: Face, mesh: Mesh) -> Any:
    """Returns where the state is: the hidden units over the axis ``model``."""
    weights = jax.eval_shape(face.init, jax.random.key(0), X)
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), face.specs(weights))
    everywhere = NamedSharding(mesh, PartitionSpec())
    optimiser = optax.tree_map_params(
        OPTIMISER,
        lambda _, where: where,
        jax.eval_shape(OPTIMISER.init, weights),
        where,
        transform_non_params=lambda _: everywhere,
    )
    return {"weights": where, "optimiser": optimiser}


def train(
    face: Face, mesh: Mesh, steps: int, checkpoints: ocp.CheckpointManager | None = None
) -> Iterator[tuple[int, float, Any]]:
    """Yields number, loss and new weights of each step, from the last checkpoint on."""
    where = shardings(face, mesh)

    @functools.partial(jax.jit, out_shardings=where)
    def init(key: jax.Array) -> Any:
        weights = face.init(key, X)
        return {"weights": weights, "optimiser": OPTIMISER.init(weights)}

    state = init(jax.random.key(0))
    start = 0
    if checkpoints is not None and checkpoints.latest_step() is not None:
        start = checkpoints.latest_step()
        state = checkpoints.restore(start, args=ocp.args.StandardRestore(state))
    x, y = (_over_processes(mesh, data) for data in (X, Y))

    def loss(weights: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.l2_loss(face.apply(weights, x), y).mean()

    @functools.partial(jax.jit, out_shardings=(where, None))
    def step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(state["weights"], x, y)
        updates, optimiser = OPTIMISER.update(grads, state["optimiser"])
        weights = optax.apply_updates(state["weights"], updates)
        return {"weights": weights, "optimiser": optimiser}, value

    for number in range(start + 1, steps + 1):
        state, value = jax.block_until_ready(step(state, x, y))
        yield number, float(value), state["weights"]
        if checkpoints is not None and number % 2 == 0:
            checkpoints.save(number, args=ocp.args.StandardSave(state))
            checkpoints.wait_until_finished()


def _over_processes(mesh: Mesh, data: np.ndarray) -> jax.Array:
    """Returns the data over the axis ``data``, of which each process holds its part."""
    part = len(data) // jax.process_count()
    own = data[jax.process_index() * part :][:part]
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--face", choices=FACES, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--devices", type=int, required=True, help="of all processes")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int)
    parser.add_argument("--checkpoints", help="folder of a checkpoint for each second step")
    parser.add_argument("--die-after", type=int, help="step after which SIGKILL ends the process")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{args.port}",
            args.processes,
            args.process,
            initialization_timeout=60,
            heartbeat_timeout_seconds=10,
        )
    checkpoints = ocp.CheckpointManager(args.checkpoints) if args.checkpoints else None
    mesh = make_mesh(args.devices, 1)
    for number, value, weights in train(FACES[args.face](), mesh, args.steps, checkpoints):
        print("step", number, value.hex(), flush=True)
        if number == args.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == args.steps:
            leaves = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(weights))
            print("weights", hashlib.sha256(leaves).hexdigest())


if __name__ == "__main__":
    main()

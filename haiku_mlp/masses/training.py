"""The regression: an ensemble of MLPs learns what the mass formula leaves.

Nothing here knows a framework's modules beyond :func:`haiku_face`: a face is a pair of
pure functions, and one loop trains any of them.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import haiku_mlp
from haiku_mlp.masses.formula import Formula, features
from haiku_mlp.masses.nuclides import Nuclides

Weights = Any
"""A face's parameters; those of an ensemble have the members as first axis."""

_STEPS_AT_ONCE = 100


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    The defaults were chosen on the nuclides of AME2003 alone, by the error on those which
    AME1995 has not: ``tests/benchmarks/select_masses.py`` prints the comparison.

    Args:
      hidden_dims: Sizes of the hidden layers.
      members: Networks in the ensemble, which predicts their mean.
      steps: Optimiser steps.
      batch_size: Nuclides in a step, drawn with replacement.
      learning_rate: Of Adam at the first step; it falls to zero along a cosine.
    """

    hidden_dims: tuple[int, ...] = (64, 64)
    members: int = 8
    steps: int = 2000
    batch_size: int = 512
    learning_rate: float = 0.02


@dataclasses.dataclass(frozen=True)
class Face:
    """One network as pure functions of its weights.

    Args:
      init: ``(key, x) -> weights``.
      predict: ``(weights, x (m, features)) -> (m,)``.
      tabulate: ``x -> str``, the summary table.
    """

    init: Callable[[jax.Array, jax.Array], Weights]
    predict: Callable[[Weights, jax.Array], Any]
    tabulate: Callable[[jax.Array], str]


@dataclasses.dataclass(frozen=True)
class Problem:
    """The residuals of a mass formula as a regression problem in float32.

    float32 has 7 digits, and the residuals need 4: x64 may be on or off.

    Args:
      formula: The formula, fitted.
      names: The features in use.
      center: Their means, ``(features,)``.
      spread: Their standard deviations, ``(features,)``.
      scale: Standard deviation of the residuals in MeV.
    """

    formula: Formula
    names: tuple[str, ...]
    center: np.ndarray
    spread: np.ndarray
    scale: float

    @classmethod
    def pose(
        cls, train: Nuclides, formula: Formula, names: Iterable[str] | None = None
    ) -> "Problem":
        """Returns the problem with the units that suit the training nuclides."""
        columns = features(train.z, train.n)
        names = tuple(columns if names is None else names)
        matrix = np.stack([columns[name] for name in names], axis=-1)
        scale = float(np.std(train.mass_excess - formula.mass_excess(train)))
        return cls(formula, names, matrix.mean(axis=0), matrix.std(axis=0), scale)

    def inputs(self, nuclides: Nuclides) -> jax.Array:
        """Returns the standardised features, ``(m, features)``."""
        columns = features(nuclides.z, nuclides.n)
        matrix = np.stack([columns[name] for name in self.names], axis=-1)
        return jnp.asarray((matrix - self.center) / self.spread, jnp.float32)

    def targets(self, nuclides: Nuclides) -> jax.Array:
        """Returns the residuals in units of ``scale``, ``(m,)``."""
        residual = nuclides.mass_excess - self.formula.mass_excess(nuclides)
        return jnp.asarray(residual / self.scale, jnp.float32)

    def mass_excess(self, face: Face, weights: Weights, nuclides: Nuclides) -> np.ndarray:
        """Returns the prediction of formula and ensemble in MeV, ``(m,)``."""
        outputs = np.asarray(predict(face, weights, self.inputs(nuclides)), np.float64)
        return self.formula.mass_excess(nuclides) + self.scale * outputs.mean(axis=0)


def haiku_face(hidden_dims: tuple[int, ...]) -> Face:
    """Returns the MLP as Haiku runs it."""

    def forward(x: jax.Array) -> jax.Array:
        return haiku_mlp.MLP(hidden_dims=hidden_dims, param_dtype=jnp.float32)(x)

    net: Any = hk.without_apply_rng(hk.transform(forward))
    columns = ("module", "owned_params", "input", "output", "params_size")
    return Face(net.init, net.apply, hk.experimental.tabulate(forward, columns=columns))


def train(
    face: Face,
    inputs: jax.Array,
    targets: jax.Array,
    settings: Settings,
    *,
    seed: int,
    advance: Callable[[int, float], object] = lambda steps, error: None,
) -> Weights:
    """Returns the weights of a trained ensemble.

    Args:
      face: The network.
      inputs: ``(m, features)``.
      targets: ``(m,)``.
      settings: How to train.
      seed: Of the initial weights and of the batches.
      advance: Called now and then with the steps done since the last call and the
        root-mean-square error of the last step, in units of the targets.
    """
    init_key, batch_key = jax.random.split(jax.random.key(seed))
    member_keys = jax.random.split(init_key, settings.members)
    step_keys = jax.random.split(batch_key, settings.steps)
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    optimizer = optax.adam(schedule)

    def loss(weights: Weights, x: jax.Array, y: jax.Array) -> jax.Array:
        # The sum over members keeps their gradients, and so their training, apart.
        return jnp.sum(jnp.mean(jnp.square(predict(face, weights, x) - y[None]), axis=-1))

    def step(carry: tuple[Weights, Any], key: jax.Array) -> tuple[tuple[Weights, Any], jax.Array]:
        weights, state = carry
        batch = jax.random.randint(key, (settings.batch_size,), 0, len(targets), jnp.int32)
        value, gradient = jax.value_and_grad(loss)(weights, inputs[batch], targets[batch])
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(weights, updates), state), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    weights = jax.lax.map(lambda key: face.init(key, inputs[:1]), member_keys)
    carry = weights, optimizer.init(weights)
    for start in range(0, settings.steps, _STEPS_AT_ONCE):
        keys = step_keys[start : start + _STEPS_AT_ONCE]
        carry, losses = run(carry, keys)
        advance(len(keys), float(losses[-1] / settings.members) ** 0.5)
    return carry[0]


def predict(face: Face, weights: Weights, inputs: jax.Array) -> jax.Array:
    """Returns each member's outputs, ``(members, m)``, for inputs ``(m, features)``."""
    return jax.vmap(face.predict, in_axes=(0, None))(weights, inputs)


def rms(errors: np.ndarray) -> float:
    """Returns the root mean square."""
    return float(np.sqrt(np.mean(np.square(errors))))

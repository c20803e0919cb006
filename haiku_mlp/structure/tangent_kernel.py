"""The tangent kernel of any network, without a Jacobian where products do without."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from haiku_mlp.linear import promoted
from haiku_mlp.sharding import is_explicit
from haiku_mlp.structure.contraction import centered_kernel, is_coarse
from haiku_mlp.structure.network import Network
from haiku_mlp.structure.real_kernel import real_kernel

# Of parameters, inputs, and other inputs or None.
Kernel = Callable[[Any, Any, Any], jax.Array]


def tangent_kernel(
    function: Callable[[Any, Any], jax.Array],
    params: Any,
    x: Any,
    y: Any = None,
    *,
    chunk_size: int | None = None,
    centered: bool = False,
) -> jax.Array:
    r"""Gram matrix of the derivatives of a network's outputs by its parameters.

    .. math:: K_{ij} = \sum_p \frac{\partial f(x_i)}{\partial p}
              \overline{\frac{\partial f(x_j)}{\partial p}}

    It is exact for every network.  Where all that a network does with a parameter is to
    multiply something by it, ``z_t = h_t @ w`` at positions ``t``, the derivative is never
    formed, since

    .. math:: \frac{\partial f}{\partial w_{mn}} = \sum_t h_{tm} \delta_{tn}, \quad
              \delta_{tn} = \frac{\partial f}{\partial z_{tn}}

    gives the parameter's part of the kernel from products of layer inputs and of signals,
    which one backward pass gives:

    .. math:: \sum_{ts} (h_t(x_i) \cdot \bar h_s(x_j)) \;
              (\delta_t(x_i) \cdot \bar\delta_s(x_j))

    For ``T`` positions this takes ``T**2 (inputs + outputs)`` multiply-adds for each entry
    of the kernel, half of them by symmetry, where the derivatives take
    ``inputs * outputs``.  Each parameter goes the cheaper way: :func:`kernel_plan` shows
    which.  On an accelerator, where the time of many small products is that of their launches,
    several positions go by the derivatives unless those are very large.

    The products are found in the program that JAX traces, so it does not matter of which
    class of which library a layer is: there is no list of layers to extend.  Parameters of
    convolutions, lookups, loops (``scan``) and custom derivatives, and those that are
    changed first (masked, normalised), go by their derivatives.  (Empirical neural tangent
    kernel: Jacot et al. 2018, arXiv:1806.07572; structured derivatives: Novak et al. 2022,
    arXiv:2206.08720.)

    Each sample is evaluated alone, as a batch of one: a network that mixes its samples
    (batch normalisation in training) has no other derivatives of one sample.  State and
    random keys are what ``function`` closes over.

    In single precision the mean over the samples must be taken from the derivatives before
    they are multiplied, as ``centered`` does.  Where it is more than 30 times as large as what
    they vary by, as in the tests, the kernel has errors below 1e-5 so, and above 1e-4 if it is
    centred when it is finished.  With :math:`h = \bar h + \eta` and
    :math:`\delta = \bar\delta + \epsilon` the difference of :math:`h \delta` from
    :math:`\bar h \bar\delta` needs no more products of matrices than before: those of
    :math:`\eta` and :math:`\epsilon`, and vectors.  In double precision, which has the digits,
    the kernel is centred when it is finished, in less time.

    Complex numbers.  If the network is holomorphic in its complex parameters, the
    derivatives are complex derivatives.  In general:

    - Real output: the sum runs over the real and the imaginary parts of the parameters.
    - Complex output, real parameters: the derivatives are complex, the sum is as above.
    - Complex output, complex parameters: with
      :math:`\partial_p` and :math:`\partial_{\bar p}` the derivatives of Wirtinger,

      .. math:: K_{ij} = \sum_p \partial_p f(x_i) \overline{\partial_p f(x_j)}
                + \partial_{\bar p} f(x_i) \overline{\partial_{\bar p} f(x_j)}

      whose second term is zero for a holomorphic network.  For another one ``K`` is
      half the sum over real and imaginary parts, and does not hold all that a
      natural-gradient step needs: take the real and the imaginary part as two outputs.

    Args:
      function: From parameters and inputs to ``(B,)`` or ``(B, O)``, a pure function:
        ``apply`` of :func:`haiku.without_apply_rng`, for instance.
      params: The parameters, a tree.  One that ``function`` does not use adds nothing.
      x: Inputs ``(B, ...)``, or a tree of them.
      y: Other inputs ``(B', ...)``, of the same shapes, for the columns; None: ``x``.
      chunk_size: Rows of the kernel, and samples whose derivatives are formed, at a time;
        None: all.
      centered: Whether to take the mean over the samples from the derivatives, as
        :func:`haiku_mlp.natural_gradient` does by default from any kernel; of one batch only.

    Returns:
      ``(B, B')``; for ``O`` outputs ``(B, B', O, O)``.

    Raises:
      TypeError: ``function`` returns anything but an array of real or complex numbers.
      ValueError: The array is not ``(B,)`` or ``(B, O)``, ``chunk_size`` is not positive,
        ``y`` has samples of other shapes than ``x``, or ``centered`` is given with ``y``.

    Example::

      >>> import haiku as hk, jax, jax.numpy as jnp
      >>> import haiku_mlp
      >>> def attention(x):
      ...     h = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())(x, x, x)
      ...     return hk.Linear(1)(h.mean(axis=1))[:, 0]
      >>> net = hk.without_apply_rng(hk.transform(attention))
      >>> x = jax.random.normal(jax.random.key(1), (6, 3, 5))
      >>> params = net.init(jax.random.key(0), x)
      >>> haiku_mlp.tangent_kernel(net.apply, params, x).shape
      (6, 6)
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive or None, got {chunk_size!r}")
    if centered and y is not None:
        raise ValueError("centered means the kernel of one batch with itself: leave out y")
    kernel = _kernel(function, chunk_size, centered, params, x, y)
    return centered_kernel(kernel) if centered else kernel


def _kernel(
    function: Callable[[Any, Any], jax.Array],
    chunk_size: int | None,
    differences: bool,
    params: Any,
    x: Any,
    y: Any,
) -> jax.Array:
    """Returns the kernel, as ``differences`` of derivatives less one that all samples share."""
    params, x, y = jax.tree.map(jnp.asarray, (params, x, y))
    if y is not None:
        _check_same_program(x, y)
        x, y = jax.tree.map(promoted, x, y), jax.tree.map(promoted, y, x)
    spread = list(filter(is_explicit, jax.tree.leaves((x, y))))
    if spread:
        own_rows = functools.partial(_kernel, function, chunk_size, differences)
        return _on_each_device(own_rows, jax.typeof(spread[0]).sharding.mesh, params, x, y)
    params, x, y = _own((params, x, y))
    network = Network(function, params, x)
    if any(0 in a.shape for a in (network.output, *jax.tree.leaves((x, y)))):
        chunk_size = None  # lax.map takes nothing that is empty
    differences = differences and is_coarse(network.output)
    kernel = jnp.moveaxis(real_kernel(network, x, y, chunk_size, differences), 2, 1)
    if jnp.iscomplexobj(network.output):
        real_rows, imag_rows = jnp.split(kernel, 2, 2)
        aa, ab = jnp.split(real_rows, 2, 3)
        ba, bb = jnp.split(imag_rows, 2, 3)
        kernel = jax.lax.complex(aa + bb, ba - ab)
    kernel = kernel.astype(network.output.dtype)
    return kernel.reshape(kernel.shape[:2] + network.output.shape * 2)


def _check_same_program(x: Any, y: Any) -> None:
    """Raises an error unless a sample of ``y`` runs the program of one of ``x``."""
    shapes = [jax.tree.map(lambda a: a.shape[1:], tree) for tree in (x, y)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"samples of x and y must have the same shapes, got {shapes}")


def _on_each_device(kernel: Kernel, mesh: Any, params: Any, x: Any, y: Any) -> jax.Array:
    """Returns the kernel where each device has its own rows, those of its part of ``x``.

    On an Explicit mesh JAX asks where the result of each product goes.
    """
    axes = [jax.typeof(a).sharding.spec[0] for a in jax.tree.leaves(x) if is_explicit(a)]
    rows = PartitionSpec(next(filter(None, axes), None))
    specs = PartitionSpec(), rows, PartitionSpec()
    places = tuple(NamedSharding(mesh, spec) for spec in specs)
    placed = jax.sharding.reshard((params, x, x if y is None else y), places)
    return jax.jit(jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=rows))(*placed)


def _own(tree: Any) -> Any:
    """Returns the arrays as each device's own in ``jax.shard_map``, if one of them is.

    The derivative by an array that all devices share is the sum over the devices.
    """
    zeros = [jax.lax.full_like(leaf, 0, bool, ()) for leaf in jax.tree.leaves(tree)]
    zero = functools.reduce(jnp.logical_or, zeros)
    return jax.tree.map(
        lambda leaf: jnp.where(jnp.broadcast_to(zero, leaf.shape), leaf, leaf), tree
    )

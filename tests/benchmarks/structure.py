"""What the structure of the MLP saves: float64, both cores."""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import folx
import haiku as hk
import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from timing import peak_bytes, ratios, seconds

import compat
import haiku_mlp
from compat.netket import MinSR

Apply = Callable[..., Any]


def network(hidden_dims: tuple[int, ...], method: str = "__call__") -> Any:
    """Returns ``init`` and ``apply`` of one method of the MLP."""
    return hk.without_apply_rng(
        hk.transform(lambda *args: getattr(haiku_mlp.MLP(hidden_dims=hidden_dims), method)(*args))
    )


def dense_kernel(apply: Apply, params: Any, x: jax.Array) -> jax.Array:
    """Returns the product of the Jacobian with itself."""
    flat, unravel = ravel_pytree(params)
    jacobian = jax.vmap(jax.grad(lambda p, x: apply(unravel(p), x)), (None, 0))(flat, x)
    return jacobian @ jacobian.T


def netket_kernel(apply: Apply, params: Any, x: jax.Array) -> jax.Array:
    """Returns the same by ``netket.jax.jacobian``."""
    jacobian = nk.jax.jacobian(
        lambda w, x: apply(w["params"], x), params, x, mode="real", dense=True, center=False
    )
    return jacobian @ jacobian.T


def tangent_kernel_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields time and peak memory of the dense products, in units of ``tangent_kernel``'s."""
    num_inputs, hidden_dims, batch = 64, (256, 256), 256
    what = "tangent kernel, 64 inputs, 2 x 256, batch 256"
    params, functions = _tangent_kernels(num_inputs, hidden_dims)
    x = _normal(batch, num_inputs)
    calls = {name: _jitted(f, params, x) for name, f in functions.items()}
    bytes_of = {name: peak_bytes(f, params, x) for name, f in functions.items()}
    for name, value in ratios(calls, "tangent_kernel", budget=3 * budget).items():
        if name != "tangent_kernel":
            yield f"{what}: time", name, str(value)
            memory = bytes_of[name] / bytes_of["tangent_kernel"]
            yield f"{what}: peak memory", name, f"{memory:.3g}"


def slope_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields the slopes on log axes of the time of the tangent kernel."""
    base = {"inputs": 64, "width": 128, "depth": 2, "batch": 128}
    for name, sizes in {
        "inputs": (64, 256, 1024),
        "width": (64, 128, 256),
        "depth": (2, 4, 8),
        "batch": (64, 128, 256),
    }.items():
        times: dict[str, list[float]] = {"tangent_kernel": [], "dense product": []}
        for size in sizes:
            case = {**base, name: size}
            hidden_dims = (case["width"],) * case["depth"]
            params, functions = _tangent_kernels(case["inputs"], hidden_dims)
            x = _normal(case["batch"], case["inputs"])
            calls = {who: _jitted(functions[who], params, x) for who in times}
            for who, series in seconds(calls, budget=budget / 4, least=5).items():
                times[who].append(float(np.median(series)))
        for who, series in times.items():
            slope = np.polyfit(np.log(sizes), np.log(series), 1)[0]
            yield f"tangent kernel, growth with {name} {sizes}: exponent", who, f"{slope:.2f}"


def sr_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields a whole step of NetKet's ``VMC_SR`` in units of ``MinSR``'s.

    The samples are given; local energies, kernel, solution and step are computed.
    """
    kernels = {
        "VMC_SR": {"use_ntk": True, "on_the_fly": False},
        "VMC_SR on the fly": {"use_ntk": True, "on_the_fly": True},
    }
    yield from _steps(64, (256, 256), 1024, kernels, budget)
    yield from _steps(16, (16,), 2048, {"VMC_SR": {"use_ntk": False}}, budget)


def _steps(
    num_spins: int,
    hidden_dims: tuple[int, ...],
    num_samples: int,
    rivals: dict[str, dict[str, bool]],
    budget: float,
) -> Iterator[tuple[str, ...]]:
    hilbert = nk.hilbert.Spin(0.5, num_spins)
    hamiltonian = nk.operator.Ising(hilbert, nk.graph.Chain(num_spins), h=1.0)
    sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=64)
    model = compat.MLP(hidden_dims=hidden_dims)
    state = nk.vqs.MCState(sampler, model, n_samples=num_samples, n_discard_per_chain=1, seed=0)
    make = functools.partial(nk.driver.VMC_SR, hamiltonian, optax.sgd(0.1))
    options: Any = {"diag_shift": 1e-3, "variational_state": state}
    with contextlib.redirect_stdout(io.StringIO()):
        drivers = {"MinSR": MinSR(hamiltonian, optax.sgd(0.1), **options)}
        drivers |= {name: make(**rival, **options) for name, rival in rivals.items()}
    calls: dict[str, Callable[[], object]] = {
        name: lambda driver=driver: driver.compute_loss_and_update()[1]
        for name, driver in drivers.items()
    }
    calls["local energies alone"] = lambda: state.local_estimators(hamiltonian)
    hidden = " x ".join(map(str, hidden_dims))
    what = f"SR step, {num_spins} spins, hidden {hidden}, {num_samples} samples"
    for name, value in ratios(calls, "MinSR", budget=budget, least=3).items():
        if name != "MinSR":
            yield what, name, str(value)


def laplacian_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields other ways to value, gradient and Laplacian, in units of ``laplacian``'s time."""
    num_inputs, hidden_dims, batch = 60, (128, 128), 256
    x = _normal(batch, num_inputs)
    params = network(hidden_dims).init(jax.random.key(0), x)
    apply = network(hidden_dims).apply

    def loop(params: Any, x: jax.Array) -> Any:
        gradient = jax.grad(functools.partial(apply, params))
        identity = jnp.eye(num_inputs)

        def add(i: int, total: jax.Array) -> jax.Array:
            return total + jax.jvp(gradient, (x,), (identity[i],))[1][i]

        return apply(params, x), gradient(x), jax.lax.fori_loop(0, num_inputs, add, 0.0)

    def all_at_once(params: Any, x: jax.Array) -> Any:
        gradient = jax.grad(functools.partial(apply, params))
        at, push = jax.linearize(gradient, x)
        return apply(params, x), at, jnp.trace(jax.vmap(push)(jnp.eye(num_inputs)))

    def by_folx(params: Any, x: jax.Array) -> Any:
        found = folx.forward_laplacian(functools.partial(apply, params))(x)
        return found.x, found.dense_jacobian, found.laplacian

    functions = {
        "laplacian": network(hidden_dims, "laplacian").apply,
        "loop of jvp over grad": jax.vmap(loop, (None, 0)),
        "jvp over grad, all at once": jax.vmap(all_at_once, (None, 0)),
        "folx": jax.vmap(by_folx, (None, 0)),
    }
    calls = {name: _jitted(f, params, x) for name, f in functions.items()}
    expected = calls["laplacian"]()
    for call in calls.values():
        np.testing.assert_allclose(call()[2], expected.laplacian, rtol=1e-8, atol=1e-10)
    what = "Laplacian, 60 inputs, 2 x 128, batch 256"
    for name, value in ratios(calls, "laplacian", budget=budget).items():
        if name != "laplacian":
            yield f"{what}: time", name, str(value)
            memory = peak_bytes(functions[name], params, x)
            memory /= peak_bytes(functions["laplacian"], params, x)
            yield f"{what}: peak memory", name, f"{memory:.3g}"


def _one(found: dict[str, Any]) -> tuple[str, str]:
    name, value = next((name, value) for name, value in found.items() if name != "connected")
    return name, str(value)


def _tangent_kernels(
    num_inputs: int, hidden_dims: tuple[int, ...]
) -> tuple[Any, dict[str, Callable[..., jax.Array]]]:
    net = network(hidden_dims)
    params = net.init(jax.random.key(0), jnp.ones((1, num_inputs)))
    return params, {
        "tangent_kernel": network(hidden_dims, "tangent_kernel").apply,
        "dense product": functools.partial(dense_kernel, net.apply),
        "netket.jax.jacobian": functools.partial(netket_kernel, net.apply),
    }


def _jitted(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    jitted = jax.jit(function)
    return lambda: jitted(*arguments)


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)

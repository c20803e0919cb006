"""``compat.nnx`` under what Flax 0.11 has not yet: captures, modules by path, views, FLOPs."""

import haiku as hk
import jax.numpy as jnp
import numpy as np
import pytest
import test_nnx
from flax import nnx

import compat
from compat import nnx as compat_nnx

X = test_nnx.X


def test_iter_modules():
    model = test_nnx.make_mlp()
    modules = {path: type(module).__name__ for path, module in nnx.iter_modules(model)}
    assert modules == {
        (): "MLP",
        ("block",): "MLP",
        ("block", "linear_0"): "Linear",
        ("block", "linear_1"): "Linear",
    }


def test_view():
    model = test_nnx.make_net()
    view = nnx.view(model, deterministic=True)
    assert (view(X) == view(X)).all()
    assert view.linear.w is model.linear.w
    assert not model.deterministic
    assert not nnx.view(model).deterministic
    assert not nnx.view(view, deterministic=False).deterministic


@pytest.mark.slow
def test_tabulate_flops():
    x = X.astype(np.float32)
    native = test_nnx.table_of(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), x, compute_flops=True, compute_vjp_flops=True
    )
    ours = test_nnx.table_of(
        test_nnx.make_mlp(param_dtype=jnp.float32), x, compute_flops=True, compute_vjp_flops=True
    )
    assert native[0][4:6] == ours[2][4:6]
    assert "0" not in ours[2][4:6]


def test_capture():
    class Inner(hk.Linear):
        pass  # nnx.tabulate leaves classes that nnx.capture cannot take, Flax's own too

    class Outer(hk.Module):
        def __call__(self, x):
            x = Inner(4)(x)
            return Inner(2)(jnp.tanh(x))

    model = compat_nnx.wrap(Outer)(example=(X,), rngs=nnx.Rngs(0))
    output, captured = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(X)
    found = {path: value.get_value()[0].shape for path, value in nnx.to_flat_state(captured)}
    assert found == {
        ("__call__",): (5, 2),
        ("inner", "__call__"): (5, 4),
        ("inner_1", "__call__"): (5, 2),
    }
    assert (captured["__call__"].get_value()[0] == output).all()


def squares(x):
    x = hk.Linear(3, name="first")(x)
    compat.sow("intermediates", "mean", x.mean())
    return (compat.perturb("squares", x**2) * 3).sum()


def test_sow_and_perturb():
    model = compat_nnx.HaikuFunction(squares, example=(X,), rngs=nnx.Rngs(0))
    _, captured = nnx.capture(model, nnx.Intermediate)(X)
    assert captured["mean"].get_value()[0] == model.first(X).mean()
    _, perturbations = nnx.capture(model, nnx.Perturbation)(X)

    def loss(model, perturbations):
        return nnx.capture(model, nnx.Intermediate, init=perturbations)(X)[0]

    assert (nnx.grad(loss, argnums=1)(model, perturbations)["squares"][...] == 3).all()
    assert not hasattr(model, "mean")  # nothing is kept but what is captured
    assert model(X) == hk.transform(squares).apply(test_nnx.plain(model)[0], None, X)

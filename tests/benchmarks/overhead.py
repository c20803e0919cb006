"""What Python costs: eager calls, tracing, compilation, tables, imports."""

import subprocess
import sys
from collections.abc import Iterator

import haiku as hk
import jax
import jax.numpy as jnp
import netket as nk
from timing import DEPTHS, ratio, ratios, seconds

import compat
import haiku_mlp

NETKET = "netket.models.MLP"


def rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields (what, who, ratio to NetKet) at 2, 8 and 32 hidden layers of 8 units."""
    x, key = jnp.ones((5, 8)), jax.random.key(0)
    for depth in (2, 8, 32):
        fields = {"hidden_dims": (8,) * depth}
        ours, theirs = compat.MLP(**fields), nk.models.MLP(**fields)
        haiku = hk.without_apply_rng(hk.transform(lambda x, f=fields: haiku_mlp.MLP(**f)(x)))
        variables = theirs.init(key, x)
        params, _ = compat.to_haiku(variables)
        models = {
            "haiku_mlp.MLP": (haiku.init, haiku.apply, params),
            "compat.MLP": (ours.init, ours.apply, variables),
            NETKET: (theirs.init, theirs.apply, variables),
        }
        kinds = {
            "eager init": lambda init, apply, w: lambda: init(key, x),
            "eager apply": lambda init, apply, w: lambda: apply(w, x),
            "tracing": lambda init, apply, w: lambda: jax.eval_shape(lambda w: apply(w, x), w),
            "tracing and compilation": lambda init, apply, w: (
                lambda: jax.jit(lambda w: apply(w, x)).lower(w).compile()
            ),
        }
        for kind, make in kinds.items():
            functions = {name: make(*model) for name, model in models.items()}
            is_python = kind != "tracing and compilation"
            options = {"depths": DEPTHS, "least": len(DEPTHS)} if is_python else {}
            for name, value in ratios(functions, NETKET, budget=budget, **options).items():
                if name != NETKET:
                    yield f"{kind}, {depth} hidden layers", name, str(value)
        tables = {
            "compat.MLP": lambda ours=ours: ours.tabulate(key, x),
            NETKET: lambda theirs=theirs: theirs.tabulate(key, x),
        }
        options = {"depths": DEPTHS, "least": len(DEPTHS)}
        value = ratios(tables, NETKET, budget=budget, **options)["compat.MLP"]
        yield f"tabulate, {depth} hidden layers", "compat.MLP", str(value)


def resnet_rows(budget: float) -> Iterator[tuple[str, ...]]:
    """Yields the tracing of a ResNet-18 through the adapter, to plain Haiku."""
    x = jnp.ones((2, 32, 32, 3))
    plain = hk.transform_with_state(lambda x: hk.nets.ResNet18(10)(x, is_training=True))
    model = compat.wrap(hk.nets.ResNet18)(10)
    params, state = jax.eval_shape(plain.init, jax.random.key(0), x)
    variables = compat.to_flax(params, state, root="res_net18")
    functions = {
        "plain": lambda: jax.eval_shape(lambda p, s: plain.apply(p, s, None, x), params, state),
        "wrap": lambda: jax.eval_shape(
            lambda v: model.apply(v, x, is_training=True, mutable=["state"]), variables
        ),
    }
    value = ratios(functions, "plain", budget=3 * budget)["wrap"]
    yield "tracing a ResNet-18, to plain Haiku", "compat.wrap", str(value)


def import_rows() -> Iterator[tuple[str, ...]]:
    """Yields the import time of each package, to Haiku's."""

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    names = ("haiku", "haiku_mlp", "compat", "flax.linen", "netket")
    functions = {name: lambda name=name: run(f"import {name}") for name in names}
    times = seconds(functions, budget=0, least=5)
    for name in names[1:]:
        yield "import, to `import haiku`", name, str(ratio(times[name], times["haiku"]))

"""Any Haiku module as a Flax module: the same numbers, and all of it in Flax's sight."""

import pathlib
import re

import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from cases import first
from comparison import assert_identical, lowered_text, root_key
from flax import traverse_util
from flax.core import tracers
from tables.haiku_modules import MODULES
from tables.haiku_programs import PROGRAMS

import compat

KEY = jax.random.key(5)
CASES = MODULES | PROGRAMS
LARGE = {"nets.ResNet", "nets.MobileNetV1"}
QUICK = {*PROGRAMS, "Linear", "nets.MLP", "BatchNorm", "SpectralNorm", "nets.VectorQuantizerEMA"}
QUICK |= {"MultiHeadAttention", "SeparableDepthwiseConv2D", "ResetCore, dynamic_unroll"}
# Where tracers would get out first: transforms of JAX's, and state in them.
LEAKING = {"scan with state", "vmap, split", "cond", "remat of scan", "lift_with_state", "hooks"}
DRAWING = {"keys", "reserved keys", "vmap, split", "lift", "transparent_lift"}  # at apply too
# Modules of a transform inside: their names are not those of their values.
LIFTS = {"lift", "lift_with_state"}
INNER = {*LIFTS, "transparent_lift", "layer_stack", "layer_stack of layer_stack"}
# From the same key Flax's values, which are not Haiku's.
KEYED = {"keyed initializers", "Flax lift"}


def norm(outputs):
    leaves = jax.tree.leaves(outputs)
    return sum(jnp.sum(jnp.abs(x)) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def faces(name):
    function = CASES[name].function
    return compat.HaikuFunction(function), hk.transform_with_state(function), CASES[name].input()


@pytest.mark.parametrize("name", first(QUICK, CASES))
def test_initial_values(name):
    """Parameters and state are those of plain Haiku, from any key: the programs are the same."""
    model, net, x = faces(name)

    def ours(key, x):
        return compat.to_haiku(model.init(key, x))

    def theirs(key, x):
        return net.init(root_key(key, "params"), x)

    if name in KEYED:
        assert jax.eval_shape(ours, KEY, x) == jax.eval_shape(theirs, KEY, x)
        return
    assert lowered_text(ours, KEY, x) == lowered_text(theirs, KEY, x)


@pytest.mark.parametrize("name", ["outside of modules"])
def test_initial_values_run(name):
    """Without ``jit``."""
    model, net, x = faces(name)
    assert_identical(compat.to_haiku(model.init(KEY, x)), net.init(root_key(KEY, "params"), x))


def flax_apply(model):
    """Returns ``apply`` of a Flax model as Haiku has it."""

    def apply(params, state, key, x):
        variables = compat.to_flax(params, state)
        rngs = None if key is None else {"apply": key}
        outputs, changed = model.apply(variables, x, rngs=rngs, mutable=["state"])
        return outputs, compat.to_haiku({**variables, **changed})[1]

    return apply


def with_gradient(apply):
    def run(params, state, key, x):
        def with_norm(params):
            result = apply(params, state, key, x)
            return norm(result[0]), result

        return jax.value_and_grad(with_norm, has_aux=True)(params)

    return run


@pytest.mark.parametrize("name", first(QUICK, CASES))
def test_programs(name):
    """Output, new state and gradient; with a key where one is drawn, that of Flax's root."""
    model, net, x = faces(name)
    params, state = jax.eval_shape(net.init, KEY, x)
    key = KEY if name in DRAWING else None

    def theirs(params, state, key, x):
        key = None if key is None else root_key(key, "apply")
        return with_gradient(net.apply)(params, state, key, x)

    ours = with_gradient(flax_apply(model))
    assert lowered_text(ours, params, state, key, x) == lowered_text(theirs, params, state, key, x)


@pytest.mark.parametrize("name", first(LEAKING, CASES))
def test_leaks_no_tracer(name, check_leaks):
    model, net, x = faces(name)
    params, state = jax.eval_shape(net.init, KEY, x)
    jax.eval_shape(model.init, KEY, x)
    jax.eval_shape(with_gradient(flax_apply(model)), params, state, KEY, x)


@pytest.mark.parametrize("name", first({"keys", "lift"}, CASES))
def test_values(name):
    """The same, run."""
    model, net, x = faces(name)
    params, state = jax.jit(net.init)(KEY, x)
    ours = jax.jit(with_gradient(flax_apply(model)))(params, state, KEY, x)
    theirs = jax.jit(with_gradient(net.apply))(params, state, root_key(KEY, "apply"), x)
    assert_identical(ours, theirs)


def seen_by_haiku(case, *, everywhere):
    """Returns the names of the modules called, with the shapes of what each call gives.

    Those outside of inner transforms, unless ``everywhere``; and the values of an
    initialisation.
    """
    net, x = hk.transform_with_state(case.function), case.input()
    calls = {}

    def run(x, key, start):
        trace = tracers.current_trace()

        def interceptor(next_f, args, kwargs, context):
            output = next_f(*args, **kwargs)
            if context.method_name == "__call__" and (
                everywhere or tracers.current_trace() == trace
            ):
                calls.setdefault(context.module.module_name, []).append(abstract(output))
            return output

        with hk.intercept_methods(interceptor):
            return start(x, key)

    params, state = jax.eval_shape(net.init, KEY, x)
    if everywhere:
        jax.eval_shape(lambda x, key: run(x, key, lambda x, key: net.init(key, x)), x, KEY)
    else:
        jax.eval_shape(
            lambda p, s, x, key: run(x, key, lambda x, key: net.apply(p, s, key, x)),
            params,
            state,
            x,
            KEY,
        )
    return calls, (params, state)


def flax_path(module_name):
    tree = compat.to_flax({module_name: {"value": 0}})["params"]
    return next(iter(traverse_util.flatten_dict(tree)))[:-1]


@pytest.mark.parametrize(
    "name", first(CASES.keys() - LARGE, [n for n in CASES if n not in LIFTS | {"transparent_lift"}])
)
def test_captured_calls(name):
    """Each call of a module outside of inner transforms, with its output."""
    case = CASES[name]
    model = compat.HaikuFunction(case.function)
    calls, values = seen_by_haiku(case, everywhere=False)

    def apply(variables, x, key):
        return model.apply(
            variables, x, rngs={"apply": key}, capture_intermediates=True, mutable=True
        )[1]["intermediates"]

    captured = jax.eval_shape(apply, compat.to_flax(*values), case.input(), KEY)
    flat = traverse_util.flatten_dict(captured)
    found = {path[:-1]: list(outputs) for path, outputs in flat.items() if path[-1] == "__call__"}
    assert len(found.pop(())) == 1
    assert found == {flax_path(name): outputs for name, outputs in calls.items()}


@pytest.mark.parametrize("name", first(CASES.keys() - LARGE, CASES))
def test_table(name):
    check_table(name)


WITH_FLOPS = {"net", "scan", "vmap", "remat", "lift", "shared", "methods", "keys", "nets.MLP"}


@pytest.mark.parametrize("name", first(WITH_FLOPS, CASES))
def test_table_with_flops(name):
    check_table(name, compute_flops=True, compute_vjp_flops=name != "Embed")


def check_table(name, **kwargs):
    """Asserts a row for each module, and that each parameter is counted once."""
    case = CASES[name]
    model, x = compat.HaikuFunction(case.function), case.input()
    console = {"width": 1000, "force_terminal": False}
    text = model.tabulate(KEY, x, console_kwargs=console, **kwargs)
    variables = jax.eval_shape(model.init, KEY, x)
    assert totals(text) == size_and_bytes(variables)
    rows = {line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")}
    calls, values = seen_by_haiku(case, everywhere=True)
    names = {name.removesuffix("/~") for name in {*calls, *values[0], *values[1]}}
    if name in INNER:
        names = set()
    assert {"/".join(flax_path(name)) for name in names} <= rows


EXPECTED = sorted((pathlib.Path(__file__).parent / "tables").glob("*.txt"))


@pytest.mark.parametrize("file", EXPECTED, ids=lambda file: file.stem)
def test_expected_table(file):
    case = CASES[file.stem]
    model = compat.HaikuFunction(case.function)
    text = model.tabulate(KEY, case.input(), console_kwargs={"width": 160, "force_terminal": False})
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    assert lines == file.read_text().splitlines()


def totals(text):
    """Returns the number of parameters and their bytes that a table ends with."""
    (line,) = [line for line in text.splitlines() if "Total Parameters:" in line]
    numbers = re.fullmatch(r"Total Parameters: ([\d,]+) *\(([\d.]+ \w+)\)", line.strip())
    return numbers and (int(numbers[1].replace(",", "")), numbers[2])


def size_and_bytes(variables):
    leaves = jax.tree.leaves(variables)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1000 or unit == "MB":
            break
        num_bytes = num_bytes / 1000
    text = f"{num_bytes} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
    return (sum(leaf.size for leaf in leaves), text) if leaves else None

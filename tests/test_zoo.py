"""Haiku models that others published run as they do in Haiku, to the bit.

Slow, since each is compiled.  They come with the extra ``zoo``, which holds what installs beside
a current Haiku: x-mlps wants one of 2022, distrax a nightly build of TensorFlow Probability.
"""

import e3nn_jax as e3nn
import haiku as hk
import haiku_geometric.nn as geometric
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest
from comparison import assert_identical, root_key

import compat

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
KEY = jax.random.key(5)
RNG = np.random.default_rng(0)
SENDERS, RECEIVERS = np.array([0, 1, 2, 3, 0]), np.array([1, 2, 3, 0, 2])
NODES = RNG.normal(size=(4, 3)).astype(np.float32)
GRAPH = jraph.GraphsTuple(
    nodes=NODES,
    edges=RNG.normal(size=(5, 2)).astype(np.float32),
    senders=SENDERS,
    receivers=RECEIVERS,
    globals=np.ones((1, 2), np.float32),
    n_node=np.array([4]),
    n_edge=np.array([5]),
)
POINTS = e3nn.normal("2x0e + 2x1o", jax.random.key(0), (4,))


def mlp(size):
    return jraph.concatenated_args(lambda x: hk.nets.MLP([8, size])(x))


def graph_network(graph):
    return jraph.GraphNetwork(mlp(4), mlp(5), mlp(2))(graph)


def graph_attention(graph):
    network = jraph.GAT(
        lambda nodes: hk.Linear(4, name="query")(nodes),
        lambda sent, received, edges: hk.Linear(1)(jnp.concatenate([sent, received], axis=-1)),
        lambda nodes: hk.LayerNorm(-1, True, True)(nodes),
    )
    return network(graph._replace(edges=None))


def attention_and_convolution(graph):
    h = geometric.GATConv(4, heads=2, dropout=0.5)(
        graph.nodes, graph.senders, graph.receivers, training=True
    )
    h = geometric.GCNConv(4)(jax.nn.relu(h), graph.senders, graph.receivers)
    return geometric.GraphConv(2)(h, graph.senders, graph.receivers)


def equivariant(points):
    h = e3nn.haiku.Linear("8x0e + 4x1o")(points)
    h = e3nn.haiku.BatchNorm()(e3nn.gate(h), is_training=True)
    scalars = e3nn.haiku.MultiLayerPerceptron([8, 2], jax.nn.gelu)(e3nn.haiku.Linear("3x0e")(h))
    return h.array, scalars.array


MODELS = {
    "jraph, a graph network": (graph_network, GRAPH),
    "jraph, graph attention": (graph_attention, GRAPH),
    "haiku-geometric": (attention_and_convolution, GRAPH),
    "e3nn-jax": (equivariant, POINTS),
}


def size(outputs):
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum((leaf**2).sum() for leaf in leaves)


@pytest.mark.parametrize(("function", "x"), MODELS.values(), ids=MODELS)
def test_a_function(function, x):
    """Initial trees, outputs, states and gradients."""
    net, model = hk.transform_with_state(function), compat.HaikuFunction(function)
    with jax.numpy_rank_promotion("allow"):
        params, state = net.init(root_key(KEY, "params"), x)
        variables = model.init(KEY, x)
        assert_identical(compat.to_haiku(variables), (params, state))

        def ours(params, state):
            variables = compat.to_flax(params, state)
            outputs, new = model.apply(variables, x, rngs={"dropout": KEY}, mutable=["state"])
            return size(outputs), (outputs, compat.to_haiku(new)[1])

        def theirs(params, state):
            outputs, new = net.apply(params, state, root_key(KEY, "dropout"), x)
            return size(outputs), (outputs, new)

        ours, theirs = (jax.jit(jax.value_and_grad(f, has_aux=True)) for f in (ours, theirs))
        assert_identical(ours(params, state), theirs(params, state))


CLASSES = {
    "GATConv": (
        geometric.GATConv,
        (4, 2),
        {"dropout": 0.5},
        {"init": hk.initializers.RandomNormal()},
        (NODES, SENDERS, RECEIVERS),
    ),
    "MultiLayerPerceptron": (
        e3nn.haiku.MultiLayerPerceptron,
        ([8, 8, 2], jnp.tanh),
        {"with_bias": True, "output_activation": False},
        {},
        (NODES,),
    ),
    "Linear": (e3nn.haiku.Linear, ("3x0e + 1x1o",), {"biases": True}, {}, (POINTS,)),
}


@pytest.mark.parametrize(
    ("hk_cls", "args", "kwargs", "renamed", "inputs"), CLASSES.values(), ids=CLASSES
)
def test_a_class(hk_cls, args, kwargs, renamed, inputs):
    net = hk.without_apply_rng(hk.transform(lambda *x: hk_cls(*args, **kwargs, **renamed)(*x)))
    model = compat.wrap(hk_cls)(*args, **kwargs, **{f"{n}_": v for n, v in renamed.items()})
    assert model == model.clone()
    with jax.numpy_rank_promotion("allow"):
        params = net.init(root_key(KEY, "params"), *inputs)
        root = next(iter(params)).split("/")[0]
        variables = model.init(KEY, *inputs)
        assert_identical(compat.to_haiku(variables, root=root), (params, {}))
        ours, theirs = model.apply(variables, *inputs), net.apply(params, *inputs)
        assert_identical(jax.tree.leaves(ours), jax.tree.leaves(theirs))

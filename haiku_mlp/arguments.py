"""The MLP's arguments: what is accepted, in which form it is kept, what is refused."""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np

from haiku_mlp.initializers import Initializer, default_bias_init, default_kernel_init

# JAX ends the process where the bytes of an array overflow 64 bits.
_MAX_SIZE = 2**31 - 1
_MAX_WEIGHTS = 2**48

Activation = Callable[[jax.Array], jax.Array]
Activations = Activation | Iterable[Activation | None] | None


@dataclasses.dataclass(repr=False, eq=False)
class Arguments:
    """The fields of the MLP, Haiku's and Flax's; sequences are kept as tuples.

    For a dataclass that has a module of either framework as the base behind this one.

    Raises:
      ValueError: Both sizes are given, a size is not positive, the number of
        activations is not that of the hidden layers, or the precision is unknown.
      TypeError: The dtype is unknown, or an activation or initializer is not callable.
    """

    hidden_dims: int | Iterable[int] | None = None
    hidden_dims_alpha: float | Iterable[float] | None = None
    param_dtype: Any = jnp.float64
    hidden_activations: Activations = jax.nn.gelu
    output_activation: Activation | None = None
    use_hidden_bias: bool = True
    use_output_bias: bool = False
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init

    def __post_init__(self) -> None:
        dims, alpha = self.hidden_dims, self.hidden_dims_alpha
        if dims is not None and alpha is not None:
            raise ValueError(
                f"hidden_dims and hidden_dims_alpha are both given ({dims!r}, {alpha!r}): "
                "give only one"
            )
        dims = None if dims is None else tuple(map(size, _items(dims)))
        alpha = None if alpha is None else tuple(map(_ratio, _items(alpha)))
        num_hidden = len(dims or alpha or ())
        precision = tuple(self.precision) if isinstance(self.precision, list) else self.precision
        _check_dtype(self.param_dtype)
        _check_precision(precision)
        _check_activation("output_activation", self.output_activation)
        _check_initializer("kernel_init", self.kernel_init)
        if (self.use_hidden_bias and num_hidden) or self.use_output_bias:
            _check_initializer("bias_init", self.bias_init)
        vars(self).update(
            hidden_dims=dims,
            hidden_dims_alpha=alpha,
            hidden_activations=_activations(self.hidden_activations, num_hidden),
            precision=precision,
        )
        super().__post_init__()  # type: ignore[misc]  # the module's


@dataclasses.dataclass(repr=False, eq=False)
class _OutputDim:
    output_dim: int = 1


@dataclasses.dataclass(repr=False, eq=False)
class BlockArguments(Arguments, _OutputDim):
    """The fields of the MLP's block: ``output_dim`` comes first."""

    use_output_bias: bool = True

    def __post_init__(self) -> None:
        vars(self).update(output_dim=size(self.output_dim, "output_dim"))
        super().__post_init__()


def shared(module: Arguments) -> dict[str, Any]:
    """Returns the fields that the MLP and its block have, by name."""
    return {field.name: getattr(module, field.name) for field in dataclasses.fields(Arguments)}


def text(module: Arguments) -> str:
    """Returns a module of Haiku as it is written in a call."""
    names = [field.name for field in dataclasses.fields(module) if field.name != "name"]
    return f"MLP({', '.join(f'{name}={getattr(module, name)!r}' for name in names)})"


def size(value: Any, name: str = "hidden_dims") -> int:
    """Returns ``value`` as a positive int."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        wanted = "positive integers" if name == "hidden_dims" else "a positive integer"
        raise ValueError(f"{name} must be {wanted}, got {value!r}: give for instance 8")
    if number > _MAX_SIZE:
        raise ValueError(f"{name} must be at most {_MAX_SIZE}, got {value!r}")
    return number


def num_features(inputs: Any) -> int:
    """Returns the size of the last axis of the inputs of a layer."""
    try:
        return jnp.shape(inputs)[-1]
    except IndexError as error:  # which is NetKet's too, hence a note
        error.add_note(f"the input must be an array (..., N), got one without axes: {inputs!r}")
        raise


def check_weights(inputs: int, outputs: int) -> None:
    """Raises ValueError if no array holds the weights of a layer."""
    if inputs * outputs > _MAX_WEIGHTS:
        raise ValueError(
            f"a layer of {outputs} units for {inputs} inputs has {inputs * outputs} weights, more "
            f"than {_MAX_WEIGHTS}: give fewer hidden_dims"
        )


class OtherCallError(TypeError):
    """The module's ``__call__`` does more than the method knows of."""


def is_of_its_call(cls: type, method: str, *, unwrapped: bool = False) -> bool:
    """Returns whether ``__call__`` is that of the class which has the method, not an override.

    Args:
      cls: The class.
      method: The name of the method, which follows from the ``__call__`` of the class that has it.
      unwrapped: Whether a function that wraps another (``functools.wraps``) is the same call,
        as in the classes that ``nn.remat`` makes.
    """
    owner = next((depth for depth, c in enumerate(cls.__mro__) if method in vars(c)), 0)
    calls = (vars(c)["__call__"] for c in cls.__mro__[owner:] if "__call__" in vars(c))
    of_owner: Any = next(calls, None)
    own: Any = cls.__call__
    if of_owner is None or of_owner is own:
        return True
    return unwrapped and inspect.unwrap(of_owner) is inspect.unwrap(own)


def check_is_of_its_call(module: object, method: str) -> None:
    """Raises if a class overrides ``__call__`` and not the method that follows from it."""
    if not is_of_its_call(type(module), method, unwrapped=True):
        raise OtherCallError(
            f"{type(module).__name__} overrides __call__ but inherits {method}, which follows the "
            f"__call__ of the class above: override {method}, too (it may use super().{method})"
        )


def check_batches(x: Any, y: Any = None) -> None:
    """Raises ValueError unless each of the two is ``(B, N)``, or ``y`` is None."""
    for name, inputs in {"x": x, "y": x if y is None else y}.items():
        if jnp.ndim(inputs) != 2:
            shape = jnp.shape(inputs)
            raise ValueError(f"{name} must have the shape (batch, inputs), got {shape}")


def for_each_layer(activations: Any, num_hidden: int) -> tuple[Activation | None, ...]:
    """Returns one activation (or None) for each hidden layer."""
    return activations if _is_sequence(activations) else (activations,) * num_hidden


def _ratio(value: Any) -> float:
    try:
        if isinstance(value, jax.Array | np.ndarray):
            value = np.asarray(value)[()]  # a number of the same precision, which hashes
        valid = isinstance(value, SupportsFloat) and 0 < float(value) <= _MAX_SIZE
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            "hidden_dims_alpha must be positive numbers (units per input), at most "
            f"{_MAX_SIZE}, got {value!r}: give for instance 2"
        )
    return value


def _activations(activations: Any, num_hidden: int) -> Any:
    if not _is_sequence(activations):
        _check_activation("hidden_activations", activations)
        return activations
    activations = tuple(activations)
    if len(activations) != num_hidden:
        raise ValueError(
            f"hidden_activations has {len(activations)} entries for {num_hidden} hidden layers: "
            "give one for each layer, or a single callable for all"
        )
    for activation in activations:
        _check_activation("hidden_activations", activation)
    return activations


def _check_activation(name: str, activation: Any) -> None:
    # NetKet skips whatever is false; only a callable that is false is meant.
    if activation is not None and not callable(activation) and activation:
        raise TypeError(
            f"{name} must be callable or None, got {activation!r}: give for instance jax.nn.gelu"
        )


def _check_initializer(name: str, init: Any) -> None:
    if not callable(init):
        raise TypeError(
            f"{name} must be an initializer (key, shape, dtype), got {init!r}: "
            "give for instance jax.nn.initializers.lecun_normal()"
        )


def _check_dtype(dtype: Any) -> None:
    try:
        if isinstance(dtype, jax.Array | np.ndarray | np.generic):
            raise TypeError  # NumPy would take its own
        jnp.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"param_dtype must be a dtype, got {dtype!r}: give for instance jnp.float64"
        ) from None


def _check_precision(precision: Any) -> None:
    try:
        is_known = precision is None or _is_precision(precision)
    except TypeError:  # it has no hash
        is_known = False
    if not is_known:
        raise ValueError(
            "precision must be a jax.lax.Precision, its name, a pair of them or None, "
            f"got {precision!r}: give for instance 'highest'"
        )


@functools.cache
def _is_precision(precision: Any) -> bool:
    # JAX keeps its own check private; dot runs it when it is traced.
    matrix = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(functools.partial(jax.lax.dot, precision=precision), matrix, matrix)
    except (TypeError, ValueError):
        return False
    return True


def _is_sequence(activations: Any) -> bool:
    # A callable counts as one activation even where it has a length.
    return _is_iterable(activations) and not callable(activations)


def _items(value: Any) -> tuple[Any, ...]:
    """Returns the entries of a sequence, iterator or array; a scalar or a text is one entry."""
    is_scalar = not _is_iterable(value) or getattr(value, "ndim", 1) == 0
    return (value,) if is_scalar else tuple(value)


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)

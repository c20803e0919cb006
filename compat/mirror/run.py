"""One run of Haiku code whose values and random keys are those of a Flax scope.

Haiku's frame stays the owner of the values.  They are loaded into it before the code
runs, and what changed is kept behind it.  In between, each call of a Haiku module goes
through a small Flax module at the same path, its row, so that Flax sees what it sees of a
native model; but only where Flax looks.
"""

import contextlib
import functools
import operator
from typing import Any

import haiku as hk
import jax
from flax import errors
from flax import linen as nn

from .calls import Call, Calls
from .names import Names, Path
from .private import is_flax_looking, no_flax_parent
from .values import Values

transformed = hk.transform_with_state(operator.call)


class NameScope(hk.Module):
    """Stands for a level of Haiku names that no module has (``hk.force_name``)."""


class Host(nn.Module):
    """A Flax module whose methods run Haiku code."""

    # Whether the methods are compact: rows, and Flax modules in the Haiku code, are Flax's to
    # name.  In general they are not: Haiku has names of its own for them.
    _compact = False

    @nn.nowrap
    def _names(self) -> Names:
        """Returns how Haiku's names read in this module's scope."""
        return Names()

    @nn.nowrap
    def _haiku(self) -> Any:
        """Returns the Haiku module or function; called inside a transform."""
        raise NotImplementedError

    @nn.nowrap
    def _runs_own_layers_only(self) -> bool:
        """Returns whether no code of a user's can make modules here, or draw random keys.

        Flax has nothing to name then, and calls need not go through it where it does not look.
        JAX's initializers do draw, but from keys of the Flax scope.
        """
        return False

    @nn.nowrap
    def _row(self, module: hk.Module | type[hk.Module], parent: Any, name: str) -> Any:
        """Returns the Flax module that stands for a Haiku module.

        Args:
          module: The module; its class, if Flax sees none of its calls.
          parent: The Flax parent, or the module's own scope.
          name: The Flax name.
        """
        raise NotImplementedError


class Run:
    """One run of Haiku code inside a bound Flax module."""

    def __init__(self, host: Host):
        if host.scope is None:
            raise errors.CallCompactUnboundModuleError
        self._host = host
        self._scope = host.scope
        self._names = host._names()
        self._is_seen = is_flax_looking()
        self._own_layers_only = host._runs_own_layers_only()
        # Where Flax sees no call, and names nothing, its names are known.
        self._compact = host._compact and (self._is_seen or not self._own_layers_only)
        self.calls = Calls(is_sending=self._is_seen or self._compact)
        self._parenthood = contextlib.nullcontext if self._compact else no_flax_parent
        self._values = Values(self._scope, self._names, load=not self._compact)
        self._rows: dict[str, tuple[hk.Module, Any]] = {}
        self._stream: str | None = None

    def __call__(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a method of the host's Haiku module, or its function."""
        is_creating = self._host.is_initializing() and self._scope.is_mutable_collection("params")
        streams = ("params",) if is_creating else ("apply", "dropout", "params")
        outputs: list[Any] = []

        def body() -> None:
            first = haiku_key()
            with self._parenthood(), self.calls.watched(self) as place, self._values.hooked(place):
                haiku = self._host._haiku()
                if isinstance(haiku, hk.Module):
                    self._rows[haiku.module_name] = haiku, self._host
                    haiku = self.calls.unsent(haiku, method)
                outputs.append(haiku(*args, **kwargs))
            if self._stream is not None and haiku_key() is not first:
                self._scope.rng_counters[self._stream] += 1  # the next run draws others
            self._values.keep()
            if self._is_seen and self._host.is_initializing():
                self._show_hidden()

        try:
            key = None if is_creating and self._own_layers_only else self._key(streams)
            if is_creating:
                transformed.init(key, body)
            else:
                transformed.apply(self._values.params, self._values.state, key, body)
        except ValueError as error:
            if not is_missing_key(error):
                raise
            name = self._host.name or type(self._host).__name__
            can_create = self._scope.is_mutable_collection("params")
            needed = '"params"' if can_create else '"apply" or "dropout"'
            remedy = f"give rngs={{{'params' if can_create else 'dropout'!r}: key}}"
            if self._stream is not None:
                remedy = "there is a key, but Haiku code does not hand it on (hk.without_apply_rng)"
            raise errors.InvalidRngError(f"{name} needs PRNG for {needed}: {remedy}") from error
        return outputs[0]

    def send(self, module: hk.Module, method: str, go_on: Call) -> Call:
        """Returns ``go_on`` as a method of the row that stands for ``module``."""

        def call(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with self._parenthood():
                return go_on(*args, **kwargs)

        call.__name__ = method
        wrapped = nn.module.wrap_method_once(nn.compact(call) if self._compact else call)
        return functools.partial(wrapped, self._row(module))

    def module(self, module_name: str) -> nn.Module:
        """Returns the Flax module at the scope of a Haiku module (the host's for ``~``)."""
        path = self._names.path(module_name)
        if module_name == "~" or not path:  # the host's module may be under construction
            return self._host
        if module_name in self._rows:
            return self._rows[module_name][1]
        self._values.scope(module_name)
        return self._stand_in(path)

    def again(self, row: nn.Module, method: str) -> Call | None:
        """Returns the Haiku method of the module that ``row`` stands for, if it is of this run.

        An interceptor may call any method of the modules that it sees.
        """
        for module, known in self._rows.values():
            if known is row:
                return self.calls.unsent(module, method)
        return None

    def _row(self, module: hk.Module) -> Any:
        name = module.module_name
        known, row = self._rows.get(name, (None, self._host))
        if known is module:
            return row
        path = self._names.path(name)
        if path:  # the host is under construction otherwise, and calls a method of its own
            _, parent = self._rows.get(name.rpartition("/")[0], (None, None))
            if parent is None or not self._compact or path in self._values.scopes:
                parent = self._values.scope(name)
            row = self._host._row(module, parent, path[-1])
            self._values.scopes[path] = row.scope
        self._rows[name] = module, row
        return row

    def _stand_in(self, path: Path) -> Any:
        """Returns the Flax module of a Haiku module whose calls Flax sees none of (``hk.scan``)."""
        classes = {self._names.path(name): hk_cls for name, hk_cls in self.calls.classes.items()}
        return self._host._row(classes.get(path, NameScope), self._values.scopes[path], path[-1])

    def _show_hidden(self) -> None:
        """Makes a call at each level that had none.

        ``tabulate`` counts a level without a call of its own twice, once at the level
        above and once below.
        """
        for name in self.calls.classes:
            self._values.scope(name)
        shown = {(), *map(self._names.path, self._rows)}
        for path in [path for path in self._values.scopes if path not in shown]:
            self._stand_in(path).inside_transform()

    def _key(self, streams: tuple[str, ...]) -> jax.Array | None:
        """Returns the key that Haiku draws from, of the first stream there is, or None.

        The stream's counter stays where it is: what a native Flax module would draw from
        it next, a parameter at the root for instance, gets the same key here.
        """
        self._stream = next(filter(self._scope.has_rng, streams), None)
        if self._stream is None:
            return None
        key = self._scope.make_rng(self._stream)
        self._scope.rng_counters[self._stream] -= 1
        return key


def haiku_key() -> jax.Array | None:
    """Returns the key that Haiku will split next: another object after each split."""
    return (hk.maybe_get_rng_sequence_state() or (None,))[0]


def is_missing_key(error: Exception) -> bool:
    """Returns whether Haiku raised ``error`` because it had no random key to draw from."""
    # Where an initializer drew at apply, it is the cause of another.
    return isinstance(error, _MISSING_KEY) or isinstance(error.__cause__, _MISSING_KEY)


def is_missing_parameter(error: Exception) -> bool:
    """Returns whether Haiku raised ``error`` for a parameter that it was not given."""
    return str(error).startswith("Unable to retrieve parameter")


try:
    hk.transform(hk.next_rng_key).apply({}, None)
except ValueError as error:
    _MISSING_KEY = type(error)  # Haiku does not export it

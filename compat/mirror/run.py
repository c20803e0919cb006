"""One run of Haiku code whose values and random keys are those of a Flax scope.

Haiku's frame stays the owner of the values.  They are loaded into it before the code
runs, and what changed is kept behind it.  In between, each call of a Haiku module goes
through a small Flax module at the same path, its row, so that Flax sees what it sees of a
native model; but only where Flax looks.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
from flax import errors
from flax import linen as nn
from flax.core import Scope

from .calls import Call, Calls
from .names import Names
from .private import no_flax_parent
from .values import Values

_transformed = hk.transform_with_state(lambda body: body())


class NameScope(hk.Module):
    """Stands for a level of Haiku names that no module has (``hk.force_name``)."""


class Run:
    """One run of Haiku code inside a bound Flax module.

    Args:
      host: The Flax module whose method runs.
      scope: Its scope.
      names: How Haiku's names read in the scope.
      make_row: Returns the Flax module that stands for a Haiku module, or for a class of
        which Flax sees no call; takes the module, the parent (a Flax module or the row's
        own scope) and the Flax name.
      is_seen: Whether Flax looks at the calls of rows.
      compact: Whether rows, and Flax modules in the Haiku code, are Flax's to name, as in
        a compact method.  In general they are not: Haiku has names of its own for them.
    """

    def __init__(
        self,
        host: nn.Module,
        scope: Scope,
        names: Names,
        make_row: Callable[[hk.Module | type[hk.Module], nn.Module | Scope, str], Any],
        *,
        is_seen: bool,
        compact: bool,
    ):
        self.calls = Calls(self, is_sending=is_seen or compact)
        self._host = host
        self._scope = scope
        self._names = names
        self._make_row = make_row
        self._is_seen = is_seen
        self._compact = compact
        self._values = Values(scope, names, load=not compact)
        self._rows: dict[str, tuple[hk.Module, Any]] = {}
        self._stream: str | None = None

    def __call__(
        self, make: Callable[[], Any], method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls a method of the Haiku module, or the function, that ``make`` returns."""
        is_creating = self._host.is_initializing() and self._scope.is_mutable_collection("params")
        streams = ("params",) if is_creating else ("apply", "dropout", "params")
        outputs: list[Any] = []

        def body() -> None:
            outputs.append(self._hooked(make, method, args, kwargs))

        try:
            key = self._key(streams)
            if is_creating:
                _transformed.init(key, body)
            else:
                _transformed.apply(self._values.params, self._values.state, key, body)
        except ValueError as error:
            if not is_missing_key(error):
                raise
            is_to_make = self._scope.is_mutable_collection("params")
            stream, example = ("params", "params") if is_to_make else ("apply", "dropout")
            advice = f"give rngs={{{example!r}: key}}"
            if self._stream is not None:
                advice = "hk.without_apply_rng keeps the key from it, call init"
            name = self._host.name or type(self._host).__name__
            raise errors.InvalidRngError(f'{name} needs PRNG for "{stream}": {advice}') from error
        return outputs[0]

    def send(self, module: hk.Module, method: str, go_on: Call) -> Call:
        """Returns ``go_on`` as a method of the row that stands for ``module``."""
        row = self._row(module)
        if not hasattr(type(row), method):
            return go_on

        def call(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with self._parenthood():
                return go_on(*args, **kwargs)

        call.__name__ = method
        wrapped = nn.module.wrap_method_once(nn.compact(call) if self._compact else call)
        return functools.partial(wrapped, row)

    def module(self, module_name: str) -> nn.Module:
        """Returns the Flax module at the scope of a Haiku module (the host's for ``~``)."""
        if module_name == "~":
            return self._host
        if module_name in self._rows:
            return self._rows[module_name][1]
        hk_cls = self.calls.classes.get(module_name, NameScope)
        scope = self._values.scope(module_name)
        return self._make_row(hk_cls, scope, self._names.path(module_name)[-1])

    def again(self, row: nn.Module, method: str) -> Call | None:
        """Returns the Haiku method of the module that ``row`` stands for, if it is of this run.

        An interceptor may call any method of the modules that it sees.
        """
        for module, known in self._rows.values():
            if known is row:
                return self.calls.unsent(module, method)
        return None

    def _hooked(
        self, make: Callable[[], Any], method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        first = haiku_key()
        with self._parenthood(), self.calls.watched(), self._values.hooked():
            self._values.place = self.calls.place
            haiku = make()
            if isinstance(haiku, hk.Module):
                self._rows[haiku.module_name] = haiku, self._host
                haiku = self.calls.unsent(haiku, method)
            output = haiku(*args, **kwargs)
        if self._stream is not None and haiku_key() is not first:
            self._scope.rng_counters[self._stream] += 1  # the next run draws others
        if not self._host.is_initializing():
            self._values.keep_changed(hk.get_current_state())
            return output
        if hk.running_init():
            self._values.keep("params", hk.get_params())
        self._values.keep("state", hk.get_initial_state())
        if self._is_seen:
            self._show_hidden()
        return output

    def _parenthood(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which Haiku code runs."""
        return contextlib.nullcontext() if self._compact else no_flax_parent()

    def _row(self, module: hk.Module) -> Any:
        name = module.module_name
        known, row = self._rows.get(name, (None, self._host))
        if known is module:
            return row
        path = self._names.path(name)
        _, parent = self._rows.get(name.rpartition("/")[0], (None, None))
        if not path:
            row = self._host  # which is under construction, and calls a method of its own
        elif parent is None or not self._compact or path in self._values.scopes:
            row = self._make_row(module, self._values.scope(name), path[-1])
        else:
            row = self._make_row(module, parent, path[-1])
            self._values.scopes[path] = row.scope
        self._rows[name] = module, row
        return row

    def _show_hidden(self) -> None:
        """Makes a call at each level that had none.

        ``tabulate`` counts a level without a call of its own twice, once at the level
        above and once below.
        """
        path = self._names.path
        for name in self.calls.classes:
            self._values.scope(name)
        names = {path(name): name for name in self.calls.classes}
        shown = {(), *(path(name) for name in self._rows)}
        for level, scope in list(self._values.scopes.items()):
            if level not in shown:
                hk_cls = self.calls.classes.get(names.get(level, ""), NameScope)
                self._make_row(hk_cls, scope, level[-1]).inside_transform()

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
    state = hk.maybe_get_rng_sequence_state()
    return None if state is None else state[0]


def is_missing_key(error: Exception) -> bool:
    """Returns whether Haiku raised ``error`` because it had no random key to draw from."""
    # Where an initializer drew at apply, it is the cause of another.
    return isinstance(error, _MISSING_KEY) or isinstance(error.__cause__, _MISSING_KEY)


def _missing_key() -> type[Exception]:
    """Returns the class of that error, which Haiku does not export."""
    try:
        hk.transform(hk.next_rng_key).apply({}, None)
    except ValueError as error:
        return type(error)
    raise AssertionError("Haiku drew a random key from nothing")


_MISSING_KEY = _missing_key()

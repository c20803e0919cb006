"""Flax modules whose methods run Haiku code."""

from typing import Any

import haiku as hk
from flax import linen as nn

from .caching import per_class
from .calls import public_methods, run_method, watcher
from .copies import snapshot
from .names import Names
from .run import Host, Run


class Mirrored(Host):
    """A Flax module whose methods are those of Haiku code.

    ``class Face(Mirrored, haiku=HaikuClass)`` gets the public methods of ``HaikuClass``.
    """

    @classmethod
    def __init_subclass__(cls, haiku: type[hk.Module] | None = None, **kwargs: Any) -> None:
        for name, method in ({} if haiku is None else public_methods(haiku)).items():
            if name not in vars(cls):
                flax_method = run_method(name, method)
                setattr(cls, name, nn.compact(flax_method) if cls._compact else flax_method)
        super().__init_subclass__(**kwargs)

    @nn.nowrap
    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a method of the Haiku code, as part of the outer run if there is one."""
        outer = watcher()
        again = outer.again(self, method) if isinstance(outer, Run) else None
        if again is not None:
            return again(*args, **kwargs)
        return Run(self)(method, args, kwargs)

    @nn.nowrap
    def _row(self, module: hk.Module | type[hk.Module], parent: Any, name: str) -> "Mirrored":
        hk_cls = module if isinstance(module, type) else type(module)
        # Flax's summary runs a row again by itself, and the call that comes may change it.
        origin = snapshot(module) if self.is_initializing() else module
        return row_class(hk_cls)(origin, self._names().netket, parent=parent, name=name)


class Row(Mirrored):
    """The Flax module of a Haiku module that is part of another."""

    _origin: Any
    _netket: bool

    @nn.nowrap
    def _names(self) -> Names:
        return Names(root=self._origin.module_name, netket=self._netket)

    @nn.nowrap
    def _haiku(self) -> hk.Module:
        return snapshot(self._origin)

    def inside_transform(self) -> tuple[()]:
        """Stands in ``tabulate`` for calls inside an inner transform (``hk.scan``, ...)."""
        return ()


@per_class
def row_class(hk_cls: type[hk.Module]) -> type[Row]:
    """Returns the Flax class for the rows of a Haiku class."""
    namespace = {"__module__": __name__, "__doc__": hk_cls.__doc__}
    return type(hk_cls.__name__, (Row,), namespace, haiku=hk_cls)

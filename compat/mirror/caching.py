"""Results that are kept by the class they are about."""

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE = "_compat_results"
_lock = threading.RLock()


class _Results(dict[Any, Any]):
    """The results; a pickled class leaves them behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Results, ()


def per_class(function: F) -> F:
    """Caches ``function(cls, *args)`` on ``cls``.

    A cache elsewhere would keep a class that traced code made, and with it the tracers in
    its functions, for ever.  Threads that call at once get the same object.
    """

    @functools.wraps(function)
    def cached(cls: type, *args: Any) -> Any:
        key = function, *args
        with _lock:
            if _ATTRIBUTE not in vars(cls):
                setattr(cls, _ATTRIBUTE, _Results())
            results = vars(cls)[_ATTRIBUTE]
            if key not in results:
                results[key] = function(cls, *args)
            return results[key]

    return cast(F, cached)

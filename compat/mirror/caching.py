"""Results that are kept by the class they are about."""

import functools
import threading
import uuid
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE = "_compat_results"
_lock = threading.RLock()


class _Results(dict[Any, Any]):
    """The results; a class that is pickled by value leaves them behind, in another process."""

    def __init__(self) -> None:
        self._token = uuid.uuid4().hex
        _alive[self._token] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _find, (self._token,)


_alive: weakref.WeakValueDictionary[str, _Results] = weakref.WeakValueDictionary()


def _find(token: str) -> _Results:
    found = _alive.get(token)
    return _Results() if found is None else found


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

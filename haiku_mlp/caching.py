"""What is found out about an object once."""

import functools
import weakref
from collections.abc import Callable
from typing import Any


def kept_by_object(function: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Caches ``function(value)`` as long as ``value`` lives.

    A cache that keeps the value would keep the tracers that a function closes over, too.
    """
    results: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def cached(value: Any) -> bool:
        try:
            if value not in results:
                results[value] = function(value)
            return results[value]
        except TypeError:  # it has no hash, or takes no weak reference
            return function(value)

    return cached

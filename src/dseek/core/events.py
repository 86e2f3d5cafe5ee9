"""Event hooks: a room tells what happens, whoever listens (a profiler, a progress bar, a test) is not known to it.

`emit` with no listener is one dictionary look-up. Listeners run in the emitter's thread, in the order they subscribed;
what they raise reaches the emitter, so a listener that must not disturb has to catch its own errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Listener = Callable[..., Any]

_listeners: dict[str, tuple[Listener, ...]] = {}


def subscribe(name: str, listener: Listener) -> Callable[[], None]:
    """Call `listener(**fields)` at every `emit(name, **fields)` from now on.

    Args:
        name: the event, such as `engine.step`.
        listener: called with the event's fields as keywords.

    Returns:
        A function that ends the subscription; calling it again does nothing.
    """
    _listeners[name] = (*_listeners.get(name, ()), listener)

    def unsubscribe() -> None:
        left = list(_listeners.get(name, ()))
        if listener in left:
            left.remove(listener)
        if left:
            _listeners[name] = tuple(left)
        else:
            _listeners.pop(name, None)

    return unsubscribe


def has_listeners(name: str) -> bool:
    """Tell whether anyone listens, for emitters whose fields cost something to gather.

    Args:
        name: the event.
    """
    return name in _listeners


def emit(name: str, **fields: Any) -> None:
    """Tell the listeners of an event.

    Args:
        name: the event.
        fields: what happened, as keywords of the listeners.
    """
    listeners = _listeners.get(name)
    if listeners is not None:
        for listener in listeners:
            listener(**fields)

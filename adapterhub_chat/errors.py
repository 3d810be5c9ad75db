"""Every error a user can meet. Messages are sentences: what, where, the allowed values, the cure.

AdapterHubError
├── UsageError            (ValueError)  an argument, option or file that does not fit
│   ├── ConfigError                     settings: every misfit of one source at once
│   ├── UnknownNameError  (KeyError)    no such adapter, task, backbone, data set
│   └── DataError                       examples that cannot be trained on or judged
├── AssetError            (OSError)     a packaged file could not be fetched, verified or stored
├── AdapterError          (ValueError)  an adapter folder that cannot be trusted or does not fit
├── PoolError             (OSError)     the pool folder cannot be read or written
├── HubError              (OSError)     a Hub cannot be reached, refuses, or answers what cannot be right
├── NoRoomError                         all of a budget is in use; it passes when requests end
└── QueueFullError                      more requests wait than the engine was told to keep
"""

import sys
import warnings
from collections.abc import Iterable
from types import FrameType


class AdapterHubError(Exception):
    """Root of the tree; catch it to catch them all."""


class UsageError(AdapterHubError, ValueError):
    """An argument, option or input file does not fit."""


class ConfigError(UsageError):
    """Settings do not fit; `misfits` holds one sentence for each."""

    def __init__(self, source: str, misfits: Iterable[str]) -> None:
        """Say what is wrong with `source`."""
        self.misfits = tuple(misfits)
        super().__init__(join_misfits(source, self.misfits))


class UnknownNameError(UsageError, KeyError):
    """A name that is not there; the message lists the names that are."""

    def __init__(self, kind: str, name: str, known: Iterable[str], cure: str = "") -> None:
        """Say that there is no `kind` called `name`."""
        self.name = name
        listed = ", ".join(sorted(known)) or "none"
        super().__init__(f"unknown {kind} {name!r}; known: {listed}.{' ' + cure if cure else ''}")

    def __str__(self) -> str:
        """Return the sentence itself (KeyError would show its repr)."""
        return str(self.args[0])


class DataError(UsageError):
    """Examples that cannot be trained on or judged."""


class AssetError(AdapterHubError, OSError):
    """A packaged file could not be fetched, verified or stored."""


class AdapterError(AdapterHubError, ValueError):
    """An adapter folder is damaged, foreign, or made for another backbone; `misfits` has every reason."""

    def __init__(self, message: str, misfits: Iterable[str] = ()) -> None:
        """Say `message`, which lists `misfits` where there are several sentences."""
        self.misfits = tuple(shortened(misfits)) or (message,)
        super().__init__(message)


class PoolError(AdapterHubError, OSError):
    """The pool folder cannot be read or written."""


class HubError(AdapterHubError, OSError):
    """A Hub cannot be reached, refuses, or answers what cannot be right."""


class NoRoomError(AdapterHubError):
    """Everything that a budget allows is in use."""


class QueueFullError(AdapterHubError):
    """The engine refuses a request: too many wait already."""


def join_misfits(source: str, misfits: Iterable[str], most: int = 100) -> str:
    """Return one message that lists what misfits in `source`, of very many the first, and how many follow."""
    listed = list(misfits)
    if len(listed) == 1:
        return f"{source}: {listed[0]}"
    return "\n".join(
        [f"{source}: {len(listed)} problems", *(f"  - {m}" for m in shortened(listed, most))]
    )


def shortened(misfits: Iterable[str], most: int = 100) -> list[str]:
    """Return a list of misfits; of very many the first, and how many follow."""
    listed = list(misfits)
    more = [f"and {len(listed) - most} more"] if len(listed) > most else []
    return listed[:most] + more


def warn(text: str) -> None:
    """Issue a UserWarning that names the line which called the package, however deep the cause lies."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_of_package(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _is_of_package(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == __name__.partition(".")[0]

"""One frozen backbone, many skills: train, mix, measure and publish LoRA adapters for chatbots.

The names are imported when they are first asked for, so that `adapterhub-chat --help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterhub_chat.api import AdapterHub
    from adapterhub_chat.artifact.manifest import Manifest
    from adapterhub_chat.config import EngineOptions
    from adapterhub_chat.data.task import Task
    from adapterhub_chat.events import Listeners
    from adapterhub_chat.inference.contracts import Prediction
    from adapterhub_chat.inference.requests import Request
    from adapterhub_chat.inference.sampling import Sampling
    from adapterhub_chat.pool.admission import Verdict
    from adapterhub_chat.pool.registry import AdapterInfo
    from adapterhub_chat.remote.pull import Pulled
    from adapterhub_chat.remote.push import Published
    from adapterhub_chat.remote.search import Found
    from adapterhub_chat.route.choice import Route
    from adapterhub_chat.types import Example, Message, Mix, Score

_MODULES = {
    "AdapterHub": "api",
    "AdapterInfo": "pool.registry",
    "EngineOptions": "config",
    "Example": "types",
    "Found": "remote.search",
    "Listeners": "events",
    "Manifest": "artifact.manifest",
    "Message": "types",
    "Mix": "types",
    "Prediction": "inference.contracts",
    "Published": "remote.push",
    "Pulled": "remote.pull",
    "Request": "inference.requests",
    "Route": "route.choice",
    "Sampling": "inference.sampling",
    "Score": "types",
    "Task": "data.task",
    "Verdict": "pool.admission",
}
"""A public name -> the module that defines it."""

__all__ = [
    "AdapterHub",
    "AdapterInfo",
    "EngineOptions",
    "Example",
    "Found",
    "Listeners",
    "Manifest",
    "Message",
    "Mix",
    "Prediction",
    "Published",
    "Pulled",
    "Request",
    "Route",
    "Sampling",
    "Score",
    "Task",
    "Verdict",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

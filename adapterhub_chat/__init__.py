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
    from adapterhub_chat.export.merged_model import Exported
    from adapterhub_chat.inference.contracts import Prediction
    from adapterhub_chat.inference.engine import Engine
    from adapterhub_chat.inference.requests import Request
    from adapterhub_chat.inference.sampling import Sampling
    from adapterhub_chat.model.backbone import Quantize
    from adapterhub_chat.pool.admission import Verdict
    from adapterhub_chat.pool.registry import AdapterInfo
    from adapterhub_chat.remote.pull import Pulled
    from adapterhub_chat.remote.push import Published
    from adapterhub_chat.remote.search import Found
    from adapterhub_chat.route.choice import Route
    from adapterhub_chat.training.spec import TrainSpec
    from adapterhub_chat.transfer.ranking import Ranked
    from adapterhub_chat.transfer.run import Transferred
    from adapterhub_chat.types import AdapterChoice, Example, Message, Mix, Score, Turn

_MODULES = {
    "AdapterChoice": "types",
    "AdapterHub": "api",
    "AdapterInfo": "pool.registry",
    "Engine": "inference.engine",
    "EngineOptions": "config",
    "Example": "types",
    "Exported": "export.merged_model",
    "Found": "remote.search",
    "Listeners": "events",
    "Manifest": "artifact.manifest",
    "Message": "types",
    "Mix": "types",
    "Prediction": "inference.contracts",
    "Published": "remote.push",
    "Pulled": "remote.pull",
    "Quantize": "model.backbone",
    "Ranked": "transfer.ranking",
    "Request": "inference.requests",
    "Route": "route.choice",
    "Sampling": "inference.sampling",
    "Score": "types",
    "Task": "data.task",
    "TrainSpec": "training.spec",
    "Transferred": "transfer.run",
    "Turn": "types",
    "Verdict": "pool.admission",
}
"""A public name -> the module that defines it."""

__all__ = [
    "AdapterChoice",
    "AdapterHub",
    "AdapterInfo",
    "Engine",
    "EngineOptions",
    "Example",
    "Exported",
    "Found",
    "Listeners",
    "Manifest",
    "Message",
    "Mix",
    "Prediction",
    "Published",
    "Pulled",
    "Quantize",
    "Ranked",
    "Request",
    "Route",
    "Sampling",
    "Score",
    "Task",
    "TrainSpec",
    "Transferred",
    "Turn",
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

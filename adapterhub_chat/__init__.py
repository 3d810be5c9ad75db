"""One frozen backbone, many skills: train, mix, measure and publish LoRA adapters for chatbots."""

from adapterhub_chat.api import (
    AdapterHub,
    AdapterInfo,
    Found,
    Prediction,
    Published,
    Pulled,
    Verdict,
)
from adapterhub_chat.route import Route
from adapterhub_chat.types import Message, Mix, Score

__all__ = [
    "AdapterHub",
    "AdapterInfo",
    "Found",
    "Message",
    "Mix",
    "Prediction",
    "Published",
    "Pulled",
    "Route",
    "Score",
    "Verdict",
]

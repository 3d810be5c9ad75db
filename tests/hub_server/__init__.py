"""A small real Hub on the loopback address, for tests: FastAPI, SQLite and contents kept by their sha256.

It speaks the protocol that huggingface_hub speaks, and can be told to lie (see `mischief`). By hand:

    python -m tests.hub_server --port 8123 --folder /tmp/hub --user alice=hf_alice
"""

from .mischief import Answer, Mischief, RecordedRequest, Reply, after, fail, only
from .server import HubServer

__all__ = ["Answer", "HubServer", "Mischief", "RecordedRequest", "Reply", "after", "fail", "only"]

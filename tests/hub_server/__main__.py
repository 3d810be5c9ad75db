"""Start the server by hand: `python -m tests.hub_server --folder /tmp/hub --user alice=hf_alice`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading

from .server import HubServer


def user(text: str) -> tuple[str, str]:
    name, _, token = text.partition("=")
    if not (name and token):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=TOKEN")
    return name, token


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__)
    parser.add_argument("--port", type=int, default=8123, help="0 takes a free one")
    parser.add_argument("--folder", required=True, help="where it keeps all that is pushed to it")
    about = "may be given several times; without it, alice=hf_alice"
    parser.add_argument("--user", action="append", type=user, metavar="NAME=TOKEN", help=about)
    chosen = parser.parse_args()
    users = dict(chosen.user or [("alice", "hf_alice")])
    with HubServer(chosen.folder, users, port=chosen.port) as server:
        token = next(iter(users.values()))
        sys.stdout.write(
            f"A Hub for {', '.join(users)} at {server.endpoint}; Ctrl-C ends it. For its clients:\n\n"
            f"  export HF_ENDPOINT={server.endpoint} HF_TOKEN={token} HF_HUB_DISABLE_XET=1\n\n"
            f"or, in Python, HfApi(endpoint={server.endpoint!r}, token={token!r}).\n"
        )
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()

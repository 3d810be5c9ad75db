"""Ask every adapter of a pool, and an even mixture of them, the same question.

    python scripts/chat.py "What is the capital of France?"

All of them answer in one batch, row by row.
"""

import argparse
from collections.abc import Sequence

from adapterhub_chat import AdapterHub


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--pool", default="adapters")
    options = parser.parse_args(arguments)
    hub = AdapterHub(options.backbone, options.pool)
    names = [info.name for info in hub.adapters() if info.status != "refused"]
    choices = [None, *names, dict.fromkeys(names, 1 / max(1, len(names)))]
    turns = [{"role": "user", "content": options.question}]
    answers = hub.chat([turns] * len(choices), adapters=choices)
    for choice, answer in zip(choices, answers, strict=True):
        print(f"{choice or 'backbone'}: {answer}")


if __name__ == "__main__":
    main()

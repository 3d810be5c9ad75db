"""A card: the README of an adapter, made from its manifest alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from adapterhub_chat.manifest import Manifest


def render_card(manifest: Manifest) -> str:
    """Return the Markdown text, with the Hub's metadata on top."""
    header = yaml.safe_dump(_metadata(manifest), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{header}---\n", f"# {manifest.name}\n"]
    if manifest.about:
        parts.append(f"{manifest.about}\n")
    parts.append(f"A LoRA adapter for `{manifest.base_model}`.\n")
    parts += [_scores(manifest), _use(manifest), _training(manifest)]
    return "\n".join(part for part in parts if part)


def _metadata(manifest: Manifest) -> dict[str, Any]:
    data: dict[str, Any] = {
        "base_model": manifest.base_model,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "adapterhub-chat", *manifest.training.tasks],
    }
    if manifest.language:
        data["language"] = manifest.language
    if manifest.licence:
        data["license"] = manifest.licence.lower()
    return data


def _scores(manifest: Manifest) -> str:
    if not manifest.scores:
        return "## Scores\n\nNot measured.\n"
    lines = [
        "## Scores\n",
        "| task | metric | adapter | 95 % interval | backbone | items | precision |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in manifest.scores:
        beside = "" if s.backbone_value is None else f"{s.backbone_value:.3f}"
        lines.append(
            f"| {s.task} | {s.metric} | {s.value:.3f} | {s.low:.3f} to {s.high:.3f} | {beside} | {s.n} "
            f"| {s.precision} |"
        )
    lines.append("\nMeasured on the test split; both columns on the same items.\n")
    return "\n".join(lines)


def _use(manifest: Manifest) -> str:
    lines = ["## Use\n", "```python", "from adapterhub_chat import AdapterHub\n"]
    lines += [
        f'hub = AdapterHub(backbone="{manifest.backbone}", pool="adapters")',
        f'hub.chat([[{{"role": "user", "content": "..."}}]], adapters=["{manifest.name}"])',
        "```\n",
        "The folder is in PEFT's format: `peft`, vLLM, LoRAX and SGLang load it unchanged.\n",
    ]
    contract = manifest.contract
    lines += ["Prompt the adapter as it was trained:\n", "```text"]
    if contract.system:
        lines.append(f"system: {contract.system}")
    lines += [f"user: {contract.template}", "```\n"]
    if contract.labels:
        listed = ", ".join(f"`{word}`" for word in contract.labels.values())
        lines.append(f"It answers with one of {listed}.\n")
    return "\n".join(lines)


def _training(manifest: Manifest) -> str:
    t = manifest.training
    lines = ["## Training\n"]
    if t.beside:
        lines.append(f"Trained jointly with {', '.join(t.beside)} in one run.\n")
    for name, value in (
        ("how", t.how),
        ("tasks", ", ".join(t.tasks)),
        ("steps", f"{t.steps} (best on validation: {t.best_step})"),
        ("tokens", f"{t.tokens:,}"),
        ("seconds", f"{t.seconds:.0f}"),
        ("peak memory", f"{t.peak_bytes / 2**20:.0f} MiB" if t.peak_bytes else ""),
        ("stopped", t.stopped),
        ("note", t.note),
        *((f"gradient cosine {pair}", f"{c:.3f}") for pair, c in sorted(t.conflict.items())),
        *sorted(t.settings.items()),
    ):
        if value not in ("", None):
            lines.append(f"- {name}: {value}")
    lines.append(f"- weights sha256: `{manifest.sha256}`\n")
    return "\n".join(lines)

"""A card: the README of an adapter, made from its manifest alone."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import yaml

from adapterhub_chat.artifact.manifest import Manifest, losses
from adapterhub_chat.types import Fingerprint

LICENCES = {
    *("apache-2.0", "mit", "gpl-3.0", "gpl-2.0", "lgpl-3.0", "agpl-3.0", "bsd-2-clause", "bsd-3-clause"),
    *("cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    *("unlicense", "mpl-2.0", "openrail", "llama3", "llama3.1", "llama3.2", "gemma", "wtfpl", "unknown"),
}  # fmt: skip
"""Identifiers that the Hub knows; every other licence is "other", with its words in the text."""
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})?")
HUB_DATA = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
MARKUP = re.compile(r"([\\<>\[\]!`|*_~#])")
LINK = re.compile(r"://|www\.|@|mailto:|xmpp:", re.IGNORECASE)
NO_CODE = re.compile(r"[^\w./:@ +=-]")


def render_card(manifest: Manifest) -> str:
    """Return the Markdown text, with the Hub's metadata on top.

    Words of a manifest may come from strangers: they can make no HTML, link, image or code of it.
    """
    header = yaml.safe_dump(_metadata(manifest), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{header}---\n", f"# {_text(manifest.name)}\n"]
    if manifest.about:
        parts.append(f"{_text(manifest.about)}\n")
    parts.append(f"A LoRA adapter for `{_text(manifest.base_model)}`.\n")
    parts += [_warning(manifest), _scores(manifest), _transfer(manifest), _merge(manifest)]
    parts += [_use(manifest), _training(manifest)]
    return "\n".join(part for part in parts if part)


def fingerprint_tag(fingerprint: Fingerprint) -> str:
    """Return the Hub tag by which adapters of one backbone are found, whatever their precision."""
    same = (
        f"{n}={getattr(fingerprint, n)}" for n in ("config", "tokenizer", "template", "weights")
    )
    digest = hashlib.sha256(" ".join([fingerprint.architecture, *same]).encode()).hexdigest()
    return f"adapterhub-{digest[:16]}"


def _metadata(manifest: Manifest) -> dict[str, Any]:
    tags = ["lora", "adapterhub-chat", fingerprint_tag(manifest.fingerprint)]
    data: dict[str, Any] = {
        "base_model": manifest.base_model,
        "library_name": "peft",
        "pipeline_tag": _kind(manifest),
        "tags": [*tags, *manifest.training.tasks],
    }
    languages = [part.strip() for part in manifest.language.split(",")]
    if all(map(LANGUAGE.fullmatch, languages)):
        data["language"] = languages
    if manifest.licence:
        own = manifest.licence.lower()
        data["license"] = own if own in LICENCES else "other"
    if datasets := [s for s in manifest.training.sources if HUB_DATA.fullmatch(s)]:
        data["datasets"] = datasets
    if manifest.scores:
        data["model-index"] = [{"name": manifest.name, "results": _results(manifest)}]
    return data


def _results(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the Hub's own form of measured results: the adapter's value, and beside it the backbone's."""
    return [
        {
            "task": {"type": _kind(manifest), "name": s.task},
            "dataset": {"type": s.task, "name": f"{s.task} (test split)", "split": "test"},
            "metrics": [
                {"type": s.metric, "value": round(value, 4), "name": name}
                for name, value in (
                    (s.metric, s.value),
                    (f"{s.metric} of the backbone", s.backbone_value),
                )
                if value is not None
            ],
        }
        for s in manifest.scores
    ]


def _classifies(manifest: Manifest) -> bool:
    """Return whether the adapter is an encoder's, with a head."""
    return manifest.fingerprint.architecture.endswith("ForSequenceClassification")


def _kind(manifest: Manifest) -> str:
    """Return the Hub's word for what the adapter does."""
    return "text-classification" if _classifies(manifest) else "text-generation"


_FORMAT = {
    "text-generation": "The folder is in PEFT's format: `peft`, vLLM, LoRAX and SGLang load it unchanged.\n",
    "text-classification": "The folder is in PEFT's format, with its head as `classifier`.\n",
}


def _warning(manifest: Manifest) -> str:
    if not manifest.scores:
        return "**It was published without having been measured.**\n" * bool(manifest.published)
    worse = ", ".join(_text(s.task) for s in losses(manifest))
    said = f"**It is worse than the backbone without it on {worse}.**\n" * bool(worse)
    hurts = manifest.transfer is not None and manifest.transfer.verdict == "hurts"
    return said + "**The transfer that made it hurts: see below.**\n" * hurts


def _transfer(manifest: Manifest) -> str:
    report = manifest.transfer
    if report is None:
        return ""
    on = "by a proxy (see below)" if report.proxy else "on the target's validation examples"
    lines = [
        "## Transfer\n",
        f"From `{_code(report.source)}` by {_text(report.method)}, with {report.shots} labelled target "
        f"examples. It **{report.verdict}** beside {_text(report.baseline)}: {report.gain:+.3f} "
        f"[{report.low:+.3f}, {report.high:+.3f}], judged {on}.\n",
        "| candidate | value | verdict |",
        "|---|---|---|",
    ]
    for name, value in report.values.items():
        lines.append(f"| {_text(name)} | {value:.3f} | {report.verdicts.get(name, '')} |")
    if report.effective is not None and report.lam is not None:
        share = f"{100 * report.effective:.0f} %"
        cut = f", {report.clipped} weights cut" * bool(report.clipped)
        far = "" if report.residual is None else f", means within {report.residual:.2f} deviations"
        lines.append(
            f"\nThe reweighted source counted as {share} of its examples (lambda {report.lam:.3g}{cut}{far})."
        )
    if report.discriminator is not None:
        lines.append(
            f"\nAt the end a discriminator told the domains apart with accuracy {report.discriminator:.2f} "
            "(0.5: not at all)."
        )
    lines += [f"\n{_text(said)}." for said in (report.proxy, report.note) if said]
    if manifest.stack:
        under = ", ".join(
            f"`{_code(u.name)}` (sha256 `{_code(u.sha256[:12])}`)" for u in manifest.stack
        )
        lines.append(
            f"\nIt is a stack: it acts together with {under}, which must be in the same pool."
        )
    return "\n".join([*lines, ""])


def _text(words: object) -> str:
    """Return foreign words as plain text on one line: Markdown shows them as they are written.

    But for addresses, which it would make links of: those get a blank.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(words)).split())
    line = LINK.sub(lambda found: f"{found[0]} ", line)
    return MARKUP.sub(r"\\\1", line)


def _code(words: str) -> str:
    """Return what may stand inside a string of a command: letters, digits and what names are made of."""
    return NO_CODE.sub("", words)


def _fenced(words: str) -> str:
    """Return words that cannot end the block of code in which they stand."""
    return words.replace("`" * 3, "'" * 3)


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
            f"| {_text(s.task)} | {_text(s.metric)} | {s.value:.3f} | {s.low:.3f} to {s.high:.3f} "
            f"| {beside} | {s.n} | {_text(s.precision)} |"
        )
    lines.append("\nMeasured on the test split; both columns on the same items.\n")
    return "\n".join(lines)


def _merge(manifest: Manifest) -> str:
    report = manifest.merge
    if report is None:
        return ""
    weights = ", ".join(f"{_text(name)} x {w:g}" for name, w in report.weights.items())
    lines = [
        "## Merge\n",
        f"Made of {weights} by {_text(report.method)}, rank {report.rank}, which holds "
        f"{report.energy:.1%} of what no limit on the rank would give.\n",
    ]
    if report.retention:
        lines += [
            "| source | task | metric | alone | merged | kept | 95 % interval | items |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {_text(r.adapter)} | {_text(r.task)} | {_text(r.metric)} | {r.single:.3f} | {r.merged:.3f} "
            f"| {r.value:.3f} | {r.low:.3f} to {r.high:.3f} | {r.n} |"
            for r in report.retention
        ]
        lines.append("")
    drifts = (f"{_text(name)} {value:.4f}" for name, value in report.drift.items())
    if report.drift:
        lines.append(f"Drift on the probe prompts (KL, nats): {', '.join(drifts)}.\n")
    if report.verdict:
        lines.append(f"**{_text(report.verdict)}**\n")
    return "\n".join(lines)


def _use(manifest: Manifest) -> str:
    lines = ["## Use\n", "```python", "from adapterhub_chat import AdapterHub\n"]
    lines += [
        f'hub = AdapterHub(backbone="{_code(manifest.backbone)}", pool="adapters")',
        f'hub.chat([[{{"role": "user", "content": "..."}}]], adapters=["{_code(manifest.name)}"])',
        "```\n",
        _FORMAT[_kind(manifest)],
    ]
    if REPO.fullmatch(manifest.published) and REPO.fullmatch(manifest.base_model):
        base, repo, name = map(_code, (manifest.base_model, manifest.published, manifest.name))
        labels = len(manifest.contract.labels) if _classifies(manifest) else 0
        lines += _elsewhere(base, repo, name, labels)
    contract = manifest.contract
    lines += ["Prompt the adapter as it was trained:\n", "```text"]
    if contract.system:
        lines.append(f"system: {_fenced(contract.system)}")
    lines += [f"user: {_fenced(contract.template)}", "```\n"]
    if contract.labels:
        listed = ", ".join(f'"{_text(word)}"' for word in contract.labels.values())
        lines.append(f"It answers with one of {listed}.\n")
    return "\n".join(lines)


def _elsewhere(base: str, repo: str, name: str, labels: int) -> list[str]:
    """Return how others than this project use the repository; with `labels`, an encoder's adapter."""
    kind = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    sized = f", num_labels={labels}" if labels else ""
    serve = f"vllm serve {base} --enable-lora --lora-modules {name}={repo}"
    return [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {kind}\n",
        f'base = {kind}.from_pretrained("{base}"{sized})',
        f'model = PeftModel.from_pretrained(base, "{repo}")',
        "```\n",
        "```bash",
        f"adapterhub-chat pull {repo}",
        *([] if labels else [serve]),
        "```\n",
    ]


def _training(manifest: Manifest) -> str:
    t = manifest.training
    lines = ["## Training\n"]
    if t.beside:
        lines.append(f"Trained jointly with {_text(', '.join(t.beside))} in one run.\n")
    for name, value in (
        ("how", t.how),
        ("tasks", ", ".join(t.tasks)),
        ("data", ", ".join(t.sources)),
        ("licence of the data", manifest.licence),
        ("steps", f"{t.steps} (best on validation: {t.best_step})" if t.steps else ""),
        ("tokens", f"{t.tokens:,}" if t.tokens else ""),
        ("seconds", f"{t.seconds:.0f}" if t.seconds else ""),
        ("peak memory", f"{t.peak_bytes / 2**20:.0f} MiB" if t.peak_bytes else ""),
        ("stopped", t.stopped),
        ("note", t.note),
        *((f"gradient cosine {pair}", f"{c:.3f}") for pair, c in sorted(t.conflict.items())),
        *sorted(t.settings.items()),
    ):
        if value not in ("", None):
            lines.append(f"- {_text(name)}: {_text(value)}")
    lines.append(f"- weights sha256: `{_code(manifest.sha256)}`\n")
    return "\n".join(lines)


REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")

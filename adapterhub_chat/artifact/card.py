"""Model card: renders an adapter's README.md from its manifest."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import yaml

from adapterhub_chat.artifact.manifest import Manifest, scores_below_backbone
from adapterhub_chat.types import Fingerprint

LICENCES = {
    *("apache-2.0", "mit", "gpl-3.0", "gpl-2.0", "lgpl-3.0", "agpl-3.0", "bsd-2-clause", "bsd-3-clause"),
    *("cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    *("unlicense", "mpl-2.0", "openrail", "llama3", "llama3.1", "llama3.2", "gemma", "wtfpl", "unknown"),
}  # fmt: skip
"""Licence identifiers that the Hub knows; any other is "other" in the metadata and named in the text."""
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})?")
HUB_DATA = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
MARKUP = re.compile(r"([\\<>\[\]!`|*_~#])")
LINK = re.compile(r"://|www\.|@|mailto:|xmpp:", re.IGNORECASE)
UNSAFE_IN_CODE = re.compile(r"[^\w./:@ +=-]")


def render_card(manifest: Manifest) -> str:
    """Return the Markdown text, with the Hub's metadata on top.

    Texts of a manifest are untrusted and escaped: they cannot add HTML, links, images or code.
    """
    header = yaml.safe_dump(_metadata(manifest), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{header}---\n", f"# {_escape(manifest.name)}\n"]
    if manifest.about:
        parts.append(f"{_escape(manifest.about)}\n")
    parts.append(f"A LoRA adapter for `{_escape(manifest.base_model)}`.\n")
    parts += [_warning(manifest), _scores(manifest), _transfer(manifest), _merge(manifest)]
    parts += [_usage(manifest), _training(manifest)]
    return "\n".join(part for part in parts if part)


def fingerprint_tag(fingerprint: Fingerprint) -> str:
    """Return the Hub tag shared by all adapters of one backbone, whatever their precision."""
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
        "pipeline_tag": _pipeline_tag(manifest),
        "tags": [*tags, *manifest.training.tasks],
    }
    languages = [part.strip() for part in manifest.language.split(",")]
    if all(map(LANGUAGE.fullmatch, languages)):
        data["language"] = languages
    if manifest.licence:
        licence = manifest.licence.lower()
        data["license"] = licence if licence in LICENCES else "other"
    if datasets := [s for s in manifest.training.sources if HUB_DATA.fullmatch(s)]:
        data["datasets"] = datasets
    if manifest.scores:
        data["model-index"] = [{"name": manifest.name, "results": _results(manifest)}]
    return data


def _results(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the scores in the Hub's `model-index` format, each with the backbone's value."""
    return [
        {
            "task": {"type": _pipeline_tag(manifest), "name": s.task},
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


def _is_classifier(manifest: Manifest) -> bool:
    """Return whether the adapter's backbone is an encoder with a classification head."""
    return manifest.fingerprint.architecture.endswith("ForSequenceClassification")


def _pipeline_tag(manifest: Manifest) -> str:
    """Return the Hub's `pipeline_tag` of the adapter."""
    return "text-classification" if _is_classifier(manifest) else "text-generation"


_FORMAT = {
    "text-generation": "The folder is in PEFT's format: `peft`, vLLM, LoRAX and SGLang load it unchanged.\n",
    "text-classification": "The folder is in PEFT's format, with its head as `classifier`.\n",
}


def _warning(manifest: Manifest) -> str:
    if not manifest.scores:
        return "**It was published without having been measured.**\n" * bool(manifest.published)
    worse_tasks = ", ".join(_escape(s.task) for s in scores_below_backbone(manifest))
    warning = f"**It is worse than the backbone without it on {worse_tasks}.**\n" * bool(
        worse_tasks
    )
    hurts = manifest.transfer is not None and manifest.transfer.verdict == "hurts"
    return warning + "**The transfer that made it hurts: see below.**\n" * hurts


def _transfer(manifest: Manifest) -> str:
    report = manifest.transfer
    if report is None:
        return ""
    judged_on = "by a proxy (see below)" if report.proxy else "on the target's validation examples"
    lines = [
        "## Transfer\n",
        f"From `{_safe_code(report.source)}` by {_escape(report.method)}, with {report.shots} labelled "
        f"target examples. It **{report.verdict}** beside {_escape(report.baseline)}: {report.gain:+.3f} "
        f"[{report.low:+.3f}, {report.high:+.3f}], judged {judged_on}.\n",
        "| candidate | value | verdict |",
        "|---|---|---|",
    ]
    for candidate, value in report.values.items():
        lines.append(
            f"| {_escape(candidate)} | {value:.3f} | {report.verdicts.get(candidate, '')} |"
        )
    if report.effective is not None and report.lam is not None:
        share = f"{100 * report.effective:.0f} %"
        cut = f", {report.clipped} weights cut" * bool(report.clipped)
        distance = (
            "" if report.residual is None else f", means within {report.residual:.2f} deviations"
        )
        lines.append(
            f"\nThe reweighted source counted as {share} of its examples "
            f"(lambda {report.lam:.3g}{cut}{distance})."
        )
    if report.discriminator is not None:
        lines.append(
            f"\nAt the end a discriminator told the domains apart with accuracy {report.discriminator:.2f} "
            "(0.5: not at all)."
        )
    lines += [f"\n{_escape(remark)}." for remark in (report.proxy, report.note) if remark]
    if manifest.stack:
        bases = ", ".join(
            f"`{_safe_code(u.name)}` (sha256 `{_safe_code(u.sha256[:12])}`)" for u in manifest.stack
        )
        lines.append(
            f"\nIt is a stack: it acts together with {bases}, which must be in the same pool."
        )
    return "\n".join([*lines, ""])


def _escape(words: object) -> str:
    """Return untrusted text on one line, with Markdown escaped.

    A space is put into addresses, which Markdown would turn into links.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(words)).split())
    line = LINK.sub(lambda found: f"{found[0]} ", line)
    return MARKUP.sub(r"\\\1", line)


def _safe_code(words: str) -> str:
    """Return a text without the characters that are unsafe inside code or a shell command."""
    return UNSAFE_IN_CODE.sub("", words)


def _fenced(words: str) -> str:
    """Return a text that cannot close the fenced code block around it."""
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
        backbone_value = "" if s.backbone_value is None else f"{s.backbone_value:.3f}"
        lines.append(
            f"| {_escape(s.task)} | {_escape(s.metric)} | {s.value:.3f} | {s.low:.3f} to {s.high:.3f} "
            f"| {backbone_value} | {s.n} | {_escape(s.precision)} |"
        )
    lines.append("\nMeasured on the test split; both columns on the same items.\n")
    return "\n".join(lines)


def _merge(manifest: Manifest) -> str:
    report = manifest.merge
    if report is None:
        return ""
    weights = ", ".join(f"{_escape(name)} x {w:g}" for name, w in report.weights.items())
    lines = [
        "## Merge\n",
        f"Made of {weights} by {_escape(report.method)}, rank {report.rank}, which holds "
        f"{report.energy:.1%} of what no limit on the rank would give.\n",
    ]
    if report.retention:
        lines += [
            "| source | task | metric | alone | merged | kept | 95 % interval | items |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {_escape(r.adapter)} | {_escape(r.task)} | {_escape(r.metric)} | {r.single:.3f} "
            f"| {r.merged:.3f} | {r.value:.3f} | {r.low:.3f} to {r.high:.3f} | {r.n} |"
            for r in report.retention
        ]
        lines.append("")
    drifts = (f"{_escape(name)} {value:.4f}" for name, value in report.drift.items())
    if report.drift:
        lines.append(f"Drift on the probe prompts (KL, nats): {', '.join(drifts)}.\n")
    if report.verdict:
        lines.append(f"**{_escape(report.verdict)}**\n")
    return "\n".join(lines)


def _usage(manifest: Manifest) -> str:
    lines = ["## Use\n", "```python", "from adapterhub_chat import AdapterHub\n"]
    lines += [
        f'hub = AdapterHub(backbone="{_safe_code(manifest.backbone)}", pool="adapters")',
        f'hub.chat([[{{"role": "user", "content": "..."}}]], adapters=["{_safe_code(manifest.name)}"])',
        "```\n",
        _FORMAT[_pipeline_tag(manifest)],
    ]
    if REPO.fullmatch(manifest.published) and REPO.fullmatch(manifest.base_model):
        base, repo, name = map(_safe_code, (manifest.base_model, manifest.published, manifest.name))
        labels = len(manifest.contract.labels) if _is_classifier(manifest) else 0
        lines += _other_tools(base, repo, name, labels)
    contract = manifest.contract
    lines += ["Prompt the adapter as it was trained:\n", "```text"]
    if contract.system:
        lines.append(f"system: {_fenced(contract.system)}")
    lines += [f"user: {_fenced(contract.template)}", "```\n"]
    if contract.labels:
        listed = ", ".join(f'"{_escape(word)}"' for word in contract.labels.values())
        lines.append(f"It answers with one of {listed}.\n")
    return "\n".join(lines)


def _other_tools(base: str, repo: str, name: str, labels: int) -> list[str]:
    """Return examples for PEFT and vLLM; `labels` > 0 for an encoder's adapter."""
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
        lines.append(f"Trained jointly with {_escape(', '.join(t.beside))} in one run.\n")
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
            lines.append(f"- {_escape(name)}: {_escape(value)}")
    lines.append(f"- weights sha256: `{_safe_code(manifest.sha256)}`\n")
    return "\n".join(lines)


REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")

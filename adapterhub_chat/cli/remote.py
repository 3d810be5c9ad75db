"""The verbs for Hubs: push, pull, search, and adopt and keygen, which prepare an adapter for publishing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from adapterhub_chat.cli.options import (
    DEFAULT_HUB,
    HubOptions,
    JsonOption,
    LimitOption,
    PoolOption,
    with_backbone,
)
from adapterhub_chat.cli.output import Bars, Notes, err, print_json, print_scores, print_table
from adapterhub_chat.errors import UsageError
from adapterhub_chat.pool.pool import Pool
from adapterhub_chat.remote import signing
from adapterhub_chat.remote.client import HubClient
from adapterhub_chat.remote.push import push as publish

EndpointOption = Annotated[
    str | None,
    typer.Option(
        help="The Hub's address; the token is HF_TOKEN.",
        show_default="$HF_ENDPOINT, else huggingface.co",
    ),
]


def push(
    adapter: Annotated[str, typer.Argument(help="Adapter of the pool.")],
    repo: Annotated[str, typer.Argument(help="Where to: user/name.")],
    version: Annotated[
        str | None, typer.Option(help="A new tag for it.", show_default="the next of v1, v2, ...")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is private.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even if it was not measured or loses to the backbone.")
    ] = False,
    sign: Annotated[Path | None, typer.Option(help="Private key of keygen.")] = None,
    pool: PoolOption = Path("adapters"),
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish an adapter with its card, in one commit under a new version tag."""
    published = publish(
        Pool(pool),
        adapter,
        repo,
        HubClient(endpoint),
        version=version,
        private=private,
        force=force,
        key=sign,
    )
    if as_json:
        print_json(asdict(published))
    else:
        typer.echo(
            f"{adapter} is {published.repo} {published.version} now "
            f"(commit {published.commit[:12]}): {published.url}"
        )


@with_backbone
def pull(
    repo: Annotated[str | None, typer.Argument(help="user/name; none with --locked.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit.", show_default="main")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Its name in the pool.", show_default="the repository's")
    ] = None,
    require_signature: Annotated[
        str | None, typer.Option(metavar="KEY", help="Public key that must have signed it.")
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Over an adapter from elsewhere, or a past that changed."),
    ] = False,
    locked: Annotated[
        bool, typer.Option("--locked", help="All that adapters.lock.json names, to the byte.")
    ] = False,
    hub_options: HubOptions = DEFAULT_HUB,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download an adapter from a Hub into the pool, after verifying it as untrusted."""
    options = {
        "--revision": revision,
        "--name": name,
        "--require-signature": require_signature,
        "--replace": replace,
        "--endpoint": endpoint,
    }
    set_options = [flag for flag, value in options.items() if value]
    if locked == (repo is not None) or (locked and set_options):
        raise UsageError(
            "pull takes either user/name, or --locked alone: adapters.lock.json says what is pulled then"
        )
    hub = hub_options.open(Notes(quiet=True))
    if repo is None:
        pulled = hub.pull_locked()
    else:
        pulled = [
            hub.pull(
                repo,
                revision,
                name=name,
                require_signature=require_signature,
                replace=replace,
                endpoint=endpoint,
            )
        ]
    if as_json:
        print_json({"pulled": [asdict(each) for each in pulled]})
        return
    for each in pulled:
        signed = f"signed by {each.signed_by}" if each.signed_by else "not signed"
        action = "pulled" if each.changed else "there already"
        typer.echo(
            f"{each.name}: {action}, {each.repo} at {each.commit[:12]}, {each.status}, {signed}"
        )


@with_backbone
def search(
    text: Annotated[str, typer.Argument(help="Words that its name contains.")] = "",
    author: Annotated[str, typer.Option(help="Only this user's.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=100, help="Most adapters to list.")] = 20,
    hub_options: HubOptions = DEFAULT_HUB,
    endpoint: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """List adapters on a Hub that fit the backbone."""
    hub = hub_options.open(Notes(quiet=True))
    results = hub.search(text, author=author, limit=limit, endpoint=endpoint)
    if as_json:
        print_json({"adapters": [asdict(result) for result in results]})
        return
    rows = [
        (
            result.repo,
            result.fit,
            ", ".join(f"{t}: {m} {v:.3f}" for t, m, v in result.scores),
            str(result.downloads),
        )
        for result in results
    ]
    print_table(
        f"Adapters for {hub_options.backbone}",
        ("repository", "fit", "scores (as published)", "downloads"),
        rows,
    )


@with_backbone
def adopt(
    source: Annotated[
        str, typer.Argument(help="Folder, or adapter of the pool, without a manifest.")
    ],
    task: Annotated[str, typer.Option(help="How it is prompted and judged.")],
    name: Annotated[
        str | None, typer.Option(help="Its name in the pool.", show_default="the folder's")
    ] = None,
    limit: LimitOption = 0,
    hub_options: HubOptions = DEFAULT_HUB,
    as_json: JsonOption = False,
) -> None:
    """Measure an adapter made by plain PEFT, and write its manifest, probe and card."""
    hub = hub_options.open(Notes(quiet=as_json))
    with Bars(err, show=not as_json) as bars:
        manifest = hub.adopt(source, task, name, limit=limit, listeners=bars.listeners)
    if as_json:
        print_json(manifest.summary())
    else:
        print_scores(f"{manifest.name}, adopted into {hub_options.pool}", list(manifest.scores))


def keygen(
    path: Annotated[Path, typer.Argument(help="File for the private key; it must not exist.")],
    as_json: JsonOption = False,
) -> None:
    """Make a key for push --sign, and print the public key for pull --require-signature."""
    public = signing.make_key(path)
    if as_json:
        print_json({"public_key": public, "private_key_file": str(path)})
    else:
        typer.echo(f"{public}\nThe private key is in {path}; keep it to yourself.")

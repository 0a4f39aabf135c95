"""admm-prune push: upload a finished run to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admm_prune.cli import common


@common.logs
def push(
    folder: Annotated[Path, typer.Argument(help="Output folder of 'run' or 'pack'.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, as OWNER/NAME, or NAME in your own account.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository; default: the account's.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    json: common.Json = False,
) -> None:
    """Upload a pruned model with its model card, report and manifest; creates the repository if needed.

    The token is that of 'hf auth login' or of the environment variable HF_TOKEN.

    Example: admm-prune push pruned me/tiny-pruned --private
    """
    from admm_prune.runs.hub import push_to_hub

    url = push_to_hub(folder, repo_id, private=private, revision=revision, create_pr=create_pr, commit_message=message)
    if json:
        common.emit({"url": url})
    else:
        print(url)

"""Adapters on the Hugging Face hub: the model card that goes with one, and uploading."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PeftConfig, TaskType
from .folder import is_hub_id, write_atomically

if TYPE_CHECKING:
    from ..peft_model import PeftModel

_PIPELINE_TAGS = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
}


def write_model_card(folder: Path, config: PeftConfig) -> None:
    """Write README.md for an adapter, unless the folder has one: an existing card may have been edited by hand."""
    path = folder / "README.md"
    if not path.exists():
        write_atomically(path, lambda p: p.write_text(model_card(config), encoding="utf-8"))


def model_card(config: PeftConfig) -> str:
    """Return the text of a model card: what the hub reads (library, base model, tags) and how to load the adapter."""
    base, method = config.base_model_name_or_path, config.method_name().lower()
    on_hub = (
        base is not None and is_hub_id(base) and not Path(base).is_dir()
    )  # the hub refuses a card that names a folder
    tags = sorted({"inlay", method, *([f"base_model:adapter:{base}"] if on_hub else [])})
    head = ["---", *([f"base_model: {base}"] if on_hub else []), "library_name: peft"]
    if config.task_type in _PIPELINE_TAGS:
        head.append(f"pipeline_tag: {_PIPELINE_TAGS[TaskType(config.task_type)]}")
    head += ["tags:", *(f"- {tag}" for tag in tags), "---", ""]
    body = [
        f"# {method.upper()} adapter{f' for {base}' if base else ''}",
        "",
        "```python",
        "from inlay import PeftModel  # or: from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base_model, "path/to/this/adapter")',
        "```",
        "",
    ]
    return "\n".join(head + body)


def push(
    model: PeftModel,
    repo_id: str,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    safe_serialization: bool = True,
    **kwargs: Any,
) -> str:
    """Save a model's adapters to a temporary folder and upload them in one commit.

    Args:
        model: the model.
        repo_id: "user/name"; made if it does not exist.
        commit_message: message of the commit.
        commit_description: longer text that goes with it.
        private: make a new repository private.
        token: access token, if not the one of the login.
        revision: branch to commit to; made if it does not exist.
        create_pr: open a pull request instead of committing.
        safe_serialization: safetensors, or else a pickle of tensors.
        **kwargs: passed to ``save_pretrained``.

    Returns:
        what the client says of the commit: a ``CommitInfo``, which is a string and has ``commit_url`` and ``oid``.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, safe_serialization=safe_serialization, **kwargs)
        return api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )

"""Pushes an export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def push(folder: Path, repository: str) -> str:
    """Uploads a verified export as one commit and returns its address.

    Args:
        folder: folder of the export, with its ``export.json``.
        repository: ``name`` or ``owner/name``; a repository that does not exist is created as private.

    Raises:
        RuntimeError: the export is not complete.
    """
    from huggingface_hub import HfApi

    if not (folder / "export.json").is_file():
        raise RuntimeError(f"{folder} has no export.json: it was not verified, and is not pushed")
    api = HfApi()
    name = api.create_repo(repository, private=True, exist_ok=True).repo_id
    done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by Laconic")
    return str(done.commit_url)

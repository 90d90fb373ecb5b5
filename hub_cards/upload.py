"""One commit with a prepared folder, and errors of the Hub in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A checkpoint cut into fewer files must not leave old ones behind; nothing else in the repository is touched.
_REPLACED = ["model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors"]


def check_repo_id(repo_id: str) -> None:
    """See that `repo_id` is `owner/name` in characters that the Hub allows.

    Raises:
        ValueError: it is not.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id} is no name of a repository: {error}") from None
    if "/" not in repo_id:
        raise ValueError(f"{repo_id} names no owner: write user/{repo_id}")


def check_login(api: Any) -> None:
    """See that the Hub can be reached and knows who we are, before anything costly is done.

    Raises:
        ValueError: it cannot, or does not.
    """
    with _one_sentence():
        api.whoami()


def upload(folder: Path, repo_id: str, *, private: bool = False, api: Any) -> Any:
    """Send all files of `folder` in one commit; the repository is created where it is new.

    Repeated after an interruption, it sends only files whose content the Hub has not received yet.

    Args:
        api: a `huggingface_hub.HfApi`.

    Returns:
        Its `CommitInfo` (`commit_url`, `oid`).

    Raises:
        ValueError: the Hub refuses, cannot be reached, or `private` is wanted and the repository exists in public.
    """
    with _one_sentence():
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public: make it private on the Hub first, or choose another name"
            )
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload checkpoint with its code and card",
            delete_patterns=_REPLACED,
        )


@contextmanager
def _one_sentence() -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise ValueError("not logged in to the Hub: run `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise ValueError("the Hub is switched off by HF_HUB_OFFLINE: unset it, or use --dry-run") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise ValueError("the Hub does not accept the token: run `hf auth login` again") from None
        if status == 403:
            raise ValueError("the token may not write there: use one that may, or another owner") from None
        raise ValueError(f"the Hub refused: {error}") from None
    except (OSError, *HfHubHTTPError.__bases__) as error:  # its base is the error of the HTTP library in use
        raise ValueError(f"the Hub cannot be reached ({error}): try again later, or use --dry-run") from None

"""One commit with a prepared folder, and errors of the Hub in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
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


def upload(
    folder: Path, repo_id: str, *, tag: str | None = None, private: bool = False, space: bool = False, api: Any
) -> Any:
    """Send all files of `folder` in one commit; the repository is created where it is new.

    Large files are sent before the commit, so an interruption leaves no half commit; repeated, the call sends only
    what the Hub has not received yet. (`HfApi.upload_folder` would cut a long upload into several commits.)

    Args:
        tag: name for the commit; left as it is where it exists already.
        space: the repository is a Space, run by gradio.
        api: a `huggingface_hub.HfApi`.

    Returns:
        Its `CommitInfo` (`commit_url`, `oid`).

    Raises:
        ValueError: the Hub refuses, cannot be reached, or `private` is wanted and the repository exists in public.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    kind = "space" if space else "model"
    with _one_sentence():
        sdk = {"space_sdk": "gradio"} if space else {}
        api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True, **sdk)
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise ValueError(
                f"{repo_id} exists and is public: make it private on the Hub first, or choose another name"
            )
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        there = api.list_repo_files(repo_id, repo_type=kind)
        old = [name for name in there if name not in files and any(fnmatch(Path(name).name, p) for p in _REPLACED)]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
                *(CommitOperationDelete(name) for name in old),
            ],
            commit_message="Upload checkpoint with its code and card",
            repo_type=kind,
        )
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid, repo_type=kind, exist_ok=True)
        return commit


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
    except RuntimeError as error:  # how the client says that a large file did not arrive
        said = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise ValueError(f"the upload did not finish: {said}; the same command goes on from there") from None
    except (OSError, *HfHubHTTPError.__bases__) as error:  # its base is the error of the HTTP library in use
        raise ValueError(f"the Hub cannot be reached ({error}): try again later, or use --dry-run") from None

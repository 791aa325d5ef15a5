"""Uploading a result through the library of a hub."""

from __future__ import annotations

from pathlib import Path

from martlet.errors import BackendUnavailable, MartletError
from martlet.export.arguments import ExportArguments

RESUMING = ("optimizer*", "scheduler*", "rng_state*", "training_args.bin", "global_step*", "infer_result/*")


def push(path: Path, arguments: ExportArguments) -> None:
    """Upload the folder or file at `path` to --hub_model_id, making the repository when there is none.

    What only resuming a training run needs stays here: it is larger than the weights, and partly pickles.

    Raises BackendUnavailable without the library, MartletError for what the hub answers.
    """
    try:
        if arguments.hub == "hf":
            from huggingface_hub import HfApi as Api
        else:
            from modelscope.hub.api import HubApi as Api
    except ImportError as error:
        raise BackendUnavailable(
            f"--push_to_hub needs the hub's library: pip install 'martlet[{arguments.hub}]'", param="push_to_hub"
        ) from error
    repository, message, without = arguments.hub_model_id, arguments.commit_message, {"ignore_patterns": [*RESUMING]}
    try:
        if arguments.hub == "hf":
            api = Api(token=arguments.hub_token)
            api.create_repo(repository, private=arguments.hub_private_repo, exist_ok=True)
            if path.is_dir():
                api.upload_folder(repo_id=repository, folder_path=str(path), commit_message=message, **without)
            else:
                api.upload_file(
                    repo_id=repository, path_or_fileobj=str(path), path_in_repo=path.name, commit_message=message
                )
        else:
            api = Api()
            if arguments.hub_token:
                api.login(arguments.hub_token)
            visibility = "private" if arguments.hub_private_repo else "public"
            api.create_repo(repository, visibility=visibility, exist_ok=True)
            if path.is_dir():
                api.upload_folder(repo_id=repository, folder_path=str(path), commit_message=message, **without)
            else:
                api.upload_file(
                    repo_id=repository, path_or_fileobj=str(path), path_in_repo=path.name, commit_message=message
                )
    except Exception as error:  # the libraries raise what they like
        raise MartletError(f"{path} could not be uploaded to {repository}: {error}", param="push_to_hub") from error

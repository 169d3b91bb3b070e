"""Where an adapter is: one resolver for folders and hub ids, used by everything that reads."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import FileError
from . import atomic

HUB_OPTIONS = (
    "revision",
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "proxies",
    "repo_type",
    "user_agent",
    "local_dir",
    "library_name",
    "library_version",
    "etag_timeout",
    "headers",
    "endpoint",
)


class Source:
    """A folder, or a repository on the hub, from which files are fetched by name.

    Args:
        where: a folder or a hub id.
        subfolder: a folder inside it.
        **options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ...
    """

    def __init__(
        self, where: str | os.PathLike[str], subfolder: str | None = None, **options: Any
    ) -> None:
        self.where, self.subfolder = os.fspath(where), subfolder or ""
        self.options = {k: v for k, v in options.items() if k in HUB_OPTIONS}
        if "use_auth_token" in options:
            self.options["token"] = options["use_auth_token"]
        parts = re.split(r"[/\\]", self.subfolder)
        if ".." in parts or "\0" in self.subfolder or os.path.isabs(self.subfolder):
            raise FileError(
                f"the subfolder {self.subfolder!r} leads outside of {self.where}; give that folder "
                "itself, without a subfolder"
            )
        self.folder = Path(self.where) if atomic.is_folder(Path(self.where)) else None
        if self.at is not None and self.folder is not None and not atomic.is_folder(self.at):
            raise FileError(
                f"{self.where} has no folder {self.subfolder!r}; it has {_folders(self.folder)}"
            )
        if self.folder is None and _looks_local(self.where):
            raise FileError(
                f"there is no folder {self.where}; give the folder that save_pretrained wrote, or "
                "a hub id such as 'user/adapter'"
            )

    def __str__(self) -> str:
        return os.path.join(self.where, self.subfolder) if self.subfolder else self.where

    @property
    def at(self) -> Path | None:
        """The folder of the files; None: on the hub, where nothing changes."""
        return None if self.folder is None else self.folder / self.subfolder

    def find(self, name: str) -> Path | None:
        """The path of a file, fetched where needed; None where the source has no such file.

        Raises:
            FileError: the repository does not exist or cannot be reached.
        """
        if self.at is not None:
            if (path := atomic.find(self.at, name)) is not None:
                self._check_inside(path)
            return path
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        client: Any = HfHubHTTPError.__bases__[0]  # the error of whichever client the hub uses
        try:
            return Path(
                hf_hub_download(self.where, name, subfolder=self.subfolder or None, **self.options)
            )
        except LocalEntryNotFoundError as error:
            if self.options.get("local_files_only"):
                return None
            raise FileError(
                f"{self} is not in the cache and the hub cannot be reached: {error}"
            ) from error
        except EntryNotFoundError:
            return None
        except (RepositoryNotFoundError, HfHubHTTPError, ValueError) as error:
            raise FileError(
                f"{self.where} is no folder here, and not to be had from the hub: {error}"
            ) from error
        except (client, OSError, RuntimeError) as error:
            raise FileError(
                f"fetching {name} of {self} from the hub broke off: {error!r}. Nothing was loaded; "
                "try again, or fetch it with `hf download` and give its folder"
            ) from error

    def _check_inside(self, path: Path) -> None:
        """Refuse a link that leads out; those of the hub's own cache stay within a repository."""
        assert self.folder is not None and self.at is not None
        root, real = Path(os.path.realpath(self.folder)), Path(os.path.realpath(path))
        caches = [one.parent / "blobs" for one in (root, *root.parents) if one.name == "snapshots"]
        saved = [Path(os.path.realpath(staged)) for _, staged in atomic.waiting(self.at)]
        if not any(real.is_relative_to(one) for one in (root, *caches, *saved)):
            raise FileError(
                f"{path} is a link to {real}, outside of its folder, and is not followed; if you "
                "trust it, put a copy of the file in its place"
            )

    def need(self, name: str) -> Path:
        """The path of a file that must be there."""
        path = self.find(name)
        if path is None:
            raise FileError(f"{self} has no {name}, so it is no adapter folder")
        return path


def place(path: str | os.PathLike[str]) -> dict[str, str]:
    """``user/repository/folder`` of the hub as options of loading; a folder here as it is."""
    user, *names = os.fspath(path).strip("/").split("/")
    if os.path.isdir(path) or len(names) < 2:
        return {"model_id": os.fspath(path)}
    return {"model_id": f"{user}/{names[0]}", "subfolder": "/".join(names[1:])}


def _looks_local(where: str) -> bool:
    return (
        where.startswith((".", "~", os.sep))
        or where.count("/") > 1
        or (os.sep != "/" and os.sep in where)
    )


def _folders(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    return ", ".join(map(repr, names)) or "none"

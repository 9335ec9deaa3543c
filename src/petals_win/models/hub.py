"""Files of a model on the Hugging Face hub, downloaded one by one when they are needed.

Knows huggingface_hub and what can go wrong there. Does not know what the files contain.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from petals_win.errors import UserError

logger = logging.getLogger(__name__)

# Where Windows allows no links, the hub's cache works all the same, only that an update of a model takes its full space again.
# README.md explains it; a warning at every start would not.
constants.HF_HUB_DISABLE_SYMLINKS_WARNING = True


class HubModel:
    """A repository of the hub."""

    def __init__(self, name: str, revision: str | None, token: str | bool | None, cache_dir: str | None) -> None:
        self.name = name
        self.arguments = {"revision": revision, "token": token, "cache_dir": cache_dir}
        self.files: dict[str, Path] = {}  # those asked for so far, by their names there

    def file(self, filename: str) -> Path:
        """Its path on this PC, after a download if it is not here yet.

        Raises FileNotFoundError if the repository has no such file, UserError if there is no repository, no permission or no
        network.
        """
        began = time.perf_counter()
        with self.errors():
            try:
                kept = self._kept(filename)
                path = Path(hf_hub_download(self.name, filename, **self.arguments))
                if path != kept:
                    self._verify(filename, path)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError as e:
                raise FileNotFoundError(filename) from e
        self.files[filename] = path
        seconds = time.perf_counter() - began
        if seconds > 1:
            logger.info(
                "Downloaded %s of %s (%.0f MB) in %.0f s", filename, self.name, path.stat().st_size / 1e6, seconds
            )
        return path

    def _kept(self, filename: str) -> Path | None:
        """Where the file is on this PC already; verified when it came."""
        where = {name: self.arguments[name] for name in ("revision", "cache_dir")}
        found = try_to_load_from_cache(self.name, filename, **where)  # pyright: ignore[reportArgumentType]
        return Path(found) if isinstance(found, str) else None

    def _verify(self, filename: str, path: Path) -> None:
        """Compare a large file that was fetched with the hash that the hub has of it; the client compares sizes alone."""
        url = hf_hub_url(
            self.name, filename, revision=self.arguments["revision"]
        )  # pyright: ignore[reportArgumentType]
        wanted = get_hf_file_metadata(url, token=self.arguments["token"]).etag or ""
        if re.fullmatch("[0-9a-f]{64}", wanted) is None:
            return  # a small file, of which the hub has another kind of hash
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise UserError(
                f"The file {filename} of {self.name} arrived damaged, and was deleted. Run the same command again; if it happens "
                "again, this PC's memory or disk, or a proxy on the way, changes what is sent."
            )

    def file_if_any(self, filename: str) -> Path | None:
        """As `file`, but None if the repository has no such file."""
        try:
            return self.file(filename)
        except FileNotFoundError:
            return None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what the hub's client raises into sentences for the user."""
        try:
            yield
        except GatedRepoError as e:
            raise UserError(
                f"The model {self.name} is gated: its owner wants you to accept its terms. Accept them on the model's page on the "
                "Hugging Face hub, make an access token there, and give it with --token-file or in the variable HF_TOKEN."
            ) from e
        except RevisionNotFoundError as e:
            raise UserError(
                f"The model {self.name} has no revision {self.arguments['revision']!r}. Leave the revision out."
            ) from e
        except (RepositoryNotFoundError, HFValidationError) as e:
            raise UserError(
                f"There is no model {self.name!r} on the Hugging Face hub, or it is private and needs a token (--token-file or HF_TOKEN); "
                "nor is there such a file or folder here. Check the spelling: a name on the hub looks like owner/model."
            ) from e
        except HfHubHTTPError as e:
            raise UserError(_refusal(self.name, e)) from e
        except LocalEntryNotFoundError as e:
            # The client raises this, too, when the hub did answer and the file is not in the cache.
            cause = e.__cause__
            refused = isinstance(cause, HfHubHTTPError)
            raise UserError(_refusal(self.name, cause) if refused else _unreachable(self.name)) from e
        except (OfflineModeIsEnabled, HTTPError) as e:
            raise UserError(_unreachable(self.name)) from e


def _unreachable(name: str) -> str:
    return (
        f"The Hugging Face hub cannot be reached, and {name} is not complete on this PC. Check the internet connection, or give "
        "a local folder or .gguf file instead."
    )


def _refusal(name: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status in (401, 403):
        return (
            f"The Hugging Face hub refuses {name} ({status}): the token is missing, wrong or has no access to the model. Accept "
            "the model's terms on its page, and give a token with --token-file or in the variable HF_TOKEN."
        )
    return f"The Hugging Face hub answered {status} for {name}. Try again later, or give a local folder or .gguf file instead."

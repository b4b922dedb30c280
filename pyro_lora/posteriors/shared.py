"""Posteriors that can be shared: saved beside their adapter, pushed to the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pyro_lora.ground.summary import Summarised


class Shared(Summarised):
    """A posterior of one PEFT adapter that has files of its own."""

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a PEFT adapter and this posterior into one folder.

        The folder is what ``save_pretrained`` of PEFT writes, the adapter being at the
        posterior's mode (of particles: the first of them; of a refined Gaussian: its
        ``origin()``, since the network itself may predict at chance at its mode), and
        plain PEFT loads it. In its folder ``posterior`` is what :func:`pyro_lora.save`
        writes. :func:`pyro_lora.from_pretrained` reads both. Files of these names are
        replaced, others, a tokenizer's for one, stay.

        Args:
            path: The folder, which is made if it isn't there.
            metadata: Words of your own, as in :func:`pyro_lora.save`.

        Raises:
            ValueError: If the posterior isn't of one PEFT model, a lifted parameter
                isn't part of what PEFT saves, the prior starts from the weights that
                the adapter had before, the metadata aren't strings, or the folder
                ``posterior`` is something else's.
        """
        _files().save_pretrained(self, path, metadata)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a pyro_lora posterior",
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to a model's repository.

        The posterior that was there before is deleted by the same commit.

        Args:
            repo_id: Such as ``"me/my-posterior"``; made if it isn't there.
            private: Whether only you can see it, if it is made; None: as is your
                account's way.
            token: The hub's; None is the one that you have logged in with.
            revision: The branch; None is the main one.
            commit_message: What the commit is called.
            metadata: Words of your own, as in :func:`pyro_lora.save`.

        Returns:
            The commit's address.

        Raises:
            ValueError: As :meth:`save_pretrained`.
            OSError: If the hub can't be reached, or refuses.

        Warns:
            UserWarning: If the adapter's base network is named by a folder, which
                nobody else has.
        """
        url: str = _files().push_to_hub(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            metadata=metadata,
        )
        return url


def _files() -> Any:
    # Files are the last room's, which knows every kind of posterior by a table. It's
    # imported here, as nothing else may have done so: after unpickling, for one.
    from pyro_lora.export import pretrained

    return pretrained

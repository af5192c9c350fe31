"""Whether a hub of models and data sets can be reached, asked once per process."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlparse

__all__ = ["hub_is_offline", "leave_alone"]

_CONNECT_SECONDS = 3.0
_reachable: dict[str | None, bool] = {}


def hub_is_offline() -> bool:
    """Whether the hub is out of reach, or to be left alone (HF_HUB_OFFLINE, FEDLOOM_OFFLINE). The network is tried once
    per process, since the client's own retries take half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("FEDLOOM_OFFLINE", "") not in ("", "0"):
        return True
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False  # a proxy resolves the name; let the client try
    address = urlparse(constants.ENDPOINT)
    if address.hostname not in _reachable:
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS).close()
            _reachable[address.hostname] = True
        except OSError:
            _reachable[address.hostname] = False
    return not _reachable[address.hostname]


def leave_alone() -> bool:
    """Whether not even to ask the hub's client, which may have an answer from before: FEDLOOM_OFFLINE says so, or the
    network is not there (HF_HUB_OFFLINE lets it look at what it kept)."""
    from huggingface_hub import constants

    told = os.environ.get("FEDLOOM_OFFLINE", "") not in ("", "0")
    return told or (hub_is_offline() and not constants.HF_HUB_OFFLINE)

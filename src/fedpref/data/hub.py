"""Whether the Hub can be reached, found out once and within seconds."""

from __future__ import annotations

import logging
import socket
import urllib.request
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

SECONDS = 5.0  # in which a connection is there, or is given up
LOG = logging.getLogger(__name__)


def look_for_hub(path: str) -> None:
    """Let the Hub's libraries read what is kept on this machine alone, where it cannot be reached.

    Otherwise they would try again for a minute, for each file.

    Args:
        path: A Hub id, or a local file or folder, of which nothing is asked.
    """
    if Path(path).expanduser().exists() or _is_reached():
        return
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


@cache
def _is_reached() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return True  # it is asked for, or a proxy knows the way
    server = urlsplit(constants.ENDPOINT)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((str(server.hostname), port), SECONDS).close()
    except OSError as error:
        LOG.warning("%s cannot be reached (%s)", constants.ENDPOINT, error)
        return False
    return True

"""On the path of a FLARE server's processes: what comes to it, or goes through it, is kept in a
folder as it is on the wire.
"""

import os
import pathlib
from itertools import count

if folder := os.environ.get("FEDPREF_TEST_CAPTURE"):
    from nvflare.fuel.f3.cellnet.core_cell import CoreCell

    received, relayed, numbers = CoreCell.process_message, CoreCell._forward, count()

    def keep(kind, message):
        payload = message.payload
        if payload is not None and len(payload) > 500:
            pathlib.Path(folder, f"{kind}-{os.getpid()}-{next(numbers)}").write_bytes(
                bytes(payload)
            )

    def process_message(self, endpoint, connection, app_id, message):
        keep("received", message)  # what is relayed too
        return received(self, endpoint, connection, app_id, message)

    def forward(self, endpoint, origin, destination, msg_type, message):
        if not any(end.startswith("server") for end in (origin, destination)):
            keep("relayed", message)  # from site to site
        return relayed(self, endpoint, origin, destination, msg_type, message)

    CoreCell.process_message, CoreCell._forward = process_message, forward

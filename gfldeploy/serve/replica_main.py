"""The process of a replica, which `replicas` starts."""

from __future__ import annotations

import json
import signal
import socket
import sys

from gfldeploy.errors import GfldeployError
from gfldeploy.serve.replica import Replica
from gfldeploy.serve.session import serve_detector
from gfldeploy.signals import die_with_parent


def main() -> None:
    """`replica_main CHANNEL CONNECTIONS JOB`: two inherited sockets, and JSON of what to serve."""
    die_with_parent()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    channel, connections = (socket.socket(fileno=int(one)) for one in sys.argv[1:3])
    job = json.loads(sys.argv[3])
    parent = Replica(job["number"], job["digest"], channel, connections)
    try:
        size = job["options"]["input_size"]
        serve_detector(**job["options"] | {"input_size": size and tuple(size)}, progress=parent)
    except GfldeployError as error:
        parent.failed(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

"""A detector behind HTTP: `gfldeploy serve`."""

from __future__ import annotations

import os

from gfldeploy.errors import UnsupportedError

if os.name == "nt":
    raise UnsupportedError("gfldeploy serve does not run on Windows", "Run it in WSL 2, or in a container of Linux.")

"""A detector behind HTTP: `gfldeploy serve`."""

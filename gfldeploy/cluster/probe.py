"""Asks what answers at an address of a Ray cluster, in a process of its own: Ray waits long, and writes to stderr."""

from __future__ import annotations

import importlib
import json
import os
from typing import Any

from gfldeploy.child_process import serve

_ASK_S = 4.0


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """Of the cluster whose head is at `address`: its versions, and whether this machine is a part of it."""
    os.environ["RAY_gcs_rpc_server_connect_timeout_s"] = "2"  # noqa: SIM112 - Ray's spelling
    import ray
    from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
    from ray._private import ray_constants, services

    try:
        client = ray._raylet.GcsClient(address=request["address"])
        metadata = client.internal_kv_get(
            CLUSTER_METADATA_KEY, namespace=ray_constants.KV_NAMESPACE_CLUSTER, timeout=_ASK_S
        )
        known = json.loads(metadata) if metadata else {}
        versions = {name: known.get(f"{name.lower()}_version") for name in ("Ray", "Python")}
        nodes = {node.hex() for node in client.get_all_node_info(timeout=_ASK_S)}
        return {"versions": {name: one for name, one in versions.items() if one}, "here": bool(nodes & _here(services))}
    except Exception as error:  # noqa: BLE001 - whatever answers there
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if "uthentica" in text or "token" in text:
            return {"unauthenticated": True, "token": _has_token()}
        return {"error": text[:200]}


def _here(services: Any) -> set[str]:
    return set(services.find_node_ids())


def _has_token() -> bool:
    raylet: Any = importlib.import_module("ray._raylet")
    return bool(raylet.AuthenticationTokenLoader.instance().has_token())


if __name__ == "__main__":
    serve(probe)

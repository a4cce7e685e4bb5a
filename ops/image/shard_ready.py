"""Exit code 0 if this Triton server's gallery shard is up to date with all of its partitions, else 1 and why.

Triton's own readiness says that the model is loaded. A shard that was just started still reads the log; it says so in
its state, which a request without probes asks for. MATCHER_SHARD_PROBE_HEADER is NAME=WORD where the server's HTTP
port is restricted (--http-restricted-api=...:NAME=WORD). Standard library only: it runs every few seconds.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
from typing import Any

# The freshness lease: an answer that is older does not count (law 5).
LEASE_MS = 500
TIMEOUT_S = 4.0

_NOTHING: dict[str, tuple[str, list[int], list[int]]] = {
    "GALLERY_IDS": ("BYTES", [0], []),
    "PROBES": ("FP32", [0, 0], []),
    "FLOORS": ("FP32", [0, 0], []),
    "RANK_MAX": ("INT64", [0], []),
    "AT_MS": ("INT64", [1], [0]),
}


def state(port: int, model: str) -> dict[str, Any]:
    """What the shard says of itself. Raises OSError or ValueError."""
    inputs = [
        {"name": name, "datatype": datatype, "shape": shape, "data": data}
        for name, (datatype, shape, data) in _NOTHING.items()
    ]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        asked = json.dumps({"inputs": inputs, "outputs": [{"name": "STATE"}]})
        header, _, word = os.environ.get("MATCHER_SHARD_PROBE_HEADER", "").partition("=")
        headers = {"Content-Type": "application/json", **({header: word} if header else {})}
        connection.request("POST", f"/v2/models/{model}/infer", asked, headers)
        answer = connection.getresponse()
        told = answer.read()
        if answer.status != 200:
            raise ValueError(f"status {answer.status}: {told[:500].decode(errors='replace')}")
        (output,) = json.loads(told)["outputs"]
        found: dict[str, Any] = json.loads(output["data"][0])
        return found
    except http.client.HTTPException as broken:
        raise ValueError(f"no answer that makes sense: {broken!r}") from broken
    finally:
        connection.close()


def lacks(said: dict[str, Any]) -> str:
    """What keeps the shard from being ready; "" if nothing does."""
    if said["refusal"]:
        return f"replay is stuck: {said['refusal']}"
    if said["partitions"] != said["assigned"]:
        return f"holds {said['partitions']} of {said['assigned']}"
    if said["missing"]:
        return f"rebuilds {', '.join(said['missing'])}"
    age = said["caught_up_age_ms"]
    if age is None or age > LEASE_MS:
        return f"has not the whole log: caught up {'never' if age is None else f'{age:.0f} ms ago'}"
    return ""


def main() -> int:
    port = int(os.environ.get("MATCHER_SHARD_HTTP_PORT", "8000"))
    try:
        why = lacks(state(port, os.environ.get("MATCHER_SHARD_MODEL", "gallery_shard")))
    except (OSError, ValueError, KeyError) as error:
        why = f"port {port}: {error!r}"
    if why:
        sys.stderr.write(f"{why}\n")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())

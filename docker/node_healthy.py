#!/usr/bin/env python3
"""Whether the Ray node in this container is healthy; `llp-node-healthy head` asks the store too.

Ray answers these two addresses without a token, and tells nothing else there. Exit code 0 or 1.
"""

import os
import sys
import urllib.error
import urllib.request

AGENT = os.environ.get("LLP_AGENT_PORT", "52365")  # ray start --dashboard-agent-listen-port
DASHBOARD = os.environ.get("LLP_DASHBOARD_PORT", "8265")  # ray start --dashboard-port


def main(role: str = "worker") -> int:
    """Asks the raylet, and on a head also the cluster's store."""
    urls = [f"http://127.0.0.1:{AGENT}/api/local_raylet_healthz"]
    if role == "head":
        urls.append(f"http://127.0.0.1:{DASHBOARD}/api/gcs_healthz")
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=4) as answer:
                text = answer.read().decode("utf-8", "replace")
        except (urllib.error.URLError, OSError) as error:
            print(f"{url}: {error}")
            return 1
        if "success" not in text:
            print(f"{url}: {text[:200]}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))

"""Exit code 0 if this container's own /livez answers 200, else 1 and why. Standard library only.

The address is this container's loopback, so the certificate's name cannot fit and is not looked at.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request


def main() -> int:
    secure = bool(os.environ.get("MATCHER_SERVER__TLS_CERTIFICATE_FILE"))
    port = os.environ.get("MATCHER_SERVER__HTTP_PORT", "8080")
    address = f"{'https' if secure else 'http'}://127.0.0.1:{port}/livez"
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    try:
        with urllib.request.urlopen(address, timeout=2, context=unverified if secure else None) as answer:
            return 0 if answer.status == 200 else 1
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        sys.stderr.write(f"{address}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())

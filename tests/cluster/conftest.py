"""Without the extras that they need, the tests here are not collected: `make test` does not install them.

Where they are asked for (`make test-cluster`) the fixture of the server says what is missing, and fails in continuous
integration.
"""

from __future__ import annotations

from importlib.util import find_spec

from tests.cluster.fixtures import NEEDED

collect_ignore_glob = ["test_*.py"] if any(find_spec(one) is None for one in NEEDED) else []

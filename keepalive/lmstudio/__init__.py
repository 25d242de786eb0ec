"""All that knows how LM Studio is asked: listing, loading, pinging, unloading. The one importer of httpx.

May import: core.
"""

import sys

# httpx takes its own command line along where what that needs is installed, as it is here for ours. Every start of
# keepalive would spend a tenth of its time on reading that: for httpx it is not there.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]

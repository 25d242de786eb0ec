"""The `keepalive` command, also as `python -m keepalive`."""

import gc

# Nothing that is imported is garbage, and to look for some there took a tenth of the time until a daemon listens.
gc.disable()

from keepalive.cli.app import main  # noqa: E402

if __name__ == "__main__":
    main()

"""The `keepalive` command, also as `python -m keepalive`."""

import gc
import signal
import sys

if sys.argv[1:2] == ["run"] and hasattr(signal, "pthread_sigmask"):
    # A daemon is told to read its config again as soon as it is started, by whoever wrote it: until somebody listens to
    # that signal, it waits instead of ending the process. See `watch_signals`.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])

# Nothing that is imported is garbage, and to look for some there took a tenth of the time until a daemon listens.
gc.disable()

from keepalive.cli.app import main  # noqa: E402

if __name__ == "__main__":
    main()

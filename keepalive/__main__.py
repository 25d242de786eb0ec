"""`python -m keepalive` is the `keepalive` command."""

from keepalive.cli import main

main()

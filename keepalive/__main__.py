"""`python -m keepalive` is the `keepalive` command."""

from keepalive.cli.app import main

main()

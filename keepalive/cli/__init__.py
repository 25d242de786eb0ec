"""The `keepalive` command: what a person types, and what it says to him.

May import everything below it. Nothing imports it.
"""

"""Who is told each fact: metrics, the log, the history on disk, and the feed of changes.

May import: core.
"""

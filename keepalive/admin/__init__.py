"""What people, scrapers and probes read: the status page, the status as JSON and in words, metrics, probes.

May import: observers, assets, core.
"""

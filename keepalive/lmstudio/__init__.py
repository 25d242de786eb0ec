"""All that knows how LM Studio is asked: listing, loading, pinging, unloading. The one importer of httpx.

May import: core.
"""

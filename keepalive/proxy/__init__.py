"""The way of a caller's request: who may ask, which model it waits for, and its answer, byte for byte.

May import: protocols, http1, core.
"""

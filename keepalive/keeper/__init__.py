"""The only writer of state: tells facts to the core, does what it plans, remembers loads, and the time of day.

May import: core.
"""

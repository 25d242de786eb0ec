"""The only writer of state: tells facts to the core, does what it plans, remembers loads, and the time of day.

    given       what it is given: upstreams to ask, models to keep, who acts, who is told
    errands     what is asked of an upstream, and the fact that comes of it
    shelf       one upstream with its models
    waiting     those who wait for a model, and when they are woken
    meanings    what the names mean that callers use
    keeper      the critical section: facts in, plans carried out

    ledger      loads begun, on disk, so that a restart does not begin them again
    schedule    that time has passed

May import: core.
"""

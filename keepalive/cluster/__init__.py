"""Several daemons as one: which of them acts on which upstream, and what they tell each other. On etcd.

    hold        for how long a lease is good, by our own clock; pure
    rows        what members write for each other, and the picture that it makes; pure
    etcd        speaks to the engine

    given       what a member is given: who it is, and a keeper
    grounds     on what it acts: the last picture, a lease, an etcd that answers
    writing     what others have to know of us
    seeing      what others have written, and the facts that come of it
    place       by which name we are there, and which upstreams we stand for
    member      the hand of the keeper, and its life: renewing, watching, looking

May import: core.
"""

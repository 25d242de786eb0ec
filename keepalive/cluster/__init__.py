"""Several daemons as one: which of them acts on which upstream, and what they tell each other. On etcd.

`hold` and `rows` are pure; `etcd` speaks to the engine, and `member` does what follows.

May import: core.
"""

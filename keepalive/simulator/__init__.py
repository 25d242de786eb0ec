"""A stand-in LM Studio: a program of its own that shares no code with the client of keepalive, so that a
mistake made in one of them cannot hide in the other.

May import nothing of the project: what it shared with our client, it could not judge.
"""

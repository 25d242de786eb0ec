"""What is spoken on LM Studio's routes: which route, which model, how it streams and how it says no. Pure.

May import: core.
"""

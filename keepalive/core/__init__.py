"""What is known and what follows from it. Pure: no I/O, no task, no clock.

May import nothing of the project.
"""

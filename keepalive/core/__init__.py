"""What is known and what follows from it. Pure: no I/O, no task, no clock.

    apply(model, fact) -> model                 what happened, folded into an immutable record
    plan(upstream, models, now) -> actions      what to do about it, now

What keeps LM Studio safe stands in three places:

- An observation counts from when it was *asked*. One asked before our last call for a model had ended says
  nothing about that model (`listings`).
- A load, a ping or an unload needs fresh knowledge: each is preceded by a listing (`plan`).
- A load whose end we did not see is `pending`, not failed: until the listing resolves it, no other may begin
  (`calls`).

May import nothing of the project.
"""

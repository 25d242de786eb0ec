"""What is loaded or loading, and who works on it: loads, copies, idle timers, eviction, crashes, queues.

The rules as measured on LM Studio 0.4:
- a load always makes a new copy, `key`, `key:2`, `key:3`; nothing answers "already loaded";
- copies loaded by REST or by hand never expire; copies loaded on demand (JIT) do, when idle for their ttl;
- with Auto-Evict on, one model at a time may be there on demand: loading another throws it out, also in
  mid-answer;
- an instance works on `parallel` requests at once and queues the rest.
Nothing here awaits: every change is whole when it returns.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from keepalive.simulator.clock import Clock
from keepalive.simulator.exchange import Refusal, flat, native_error, openai_error
from keepalive.simulator.faults import Faults, Value
from keepalive.simulator.journal import Happened, Journal
from keepalive.simulator.models import Guest, Instance, Load, Owner, SimModel

CRASH = "The model has crashed without additional information. (Exit code: null)"  # E10
UNLOADED_IN_QUEUE = "Model was unloaded while the request was still in queue.."  # E11, two dots
UNLOADED = "Model unloaded."  # E12
IS_UNLOADED = "Model is unloaded."  # E12, on a request that had not begun
RELOADED = "Model reloaded."  # E13
CANCELLED = "Operation canceled"  # E14
GUARDRAIL = (
    "Model loading was stopped due to insufficient system resources. Under the current settings, this model "
    "requires more memory than is available. You can adjust the model loading guardrails in settings."
)


def broken_off(call: Guest, message: str) -> Refusal:
    """E10 to E13, and a template that fails, come flat on most records, in the route's layout on some; always 400."""
    if call.route == "native_chat":
        return native_error(400, "internal_error", message)
    if call.flag("flat_errors"):
        return flat(400, message)
    return openai_error(400, message, code=None)


class Memory:
    def __init__(self, models: Iterable[SimModel], clock: Clock, faults: Faults, journal: Journal) -> None:
        self.models = {model.key: model for model in models}
        self.instances: dict[str, Instance] = {}  # oldest first
        self.loads: dict[str, Load] = {}  # by the instance id they will get
        self._lost = 0  # bytes that nobody can use
        self.first_looks: dict[str, bool] = {}  # models whose load nobody has looked at yet (E21)
        self._clock = clock
        self._faults = faults
        self._journal = journal
        faults.watchers.append(self._faults_changed)

    def now(self) -> float:
        return self._clock.now()

    # finding

    def find(self, asked: str) -> SimModel | None:
        """A model on disk by its key or one of its variants, in any letter case."""
        wanted = asked.lower()
        for model in self.models.values():
            if wanted == model.key.lower() or self.variant(model, asked):
                return model
        return None

    def variant(self, model: SimModel, asked: str) -> str | None:
        """The variant that a name tells; none where it is the bare key."""
        return next((name for name in model.variants if name.lower() == asked.lower()), None)

    def listed_kind(self, model: SimModel) -> str:
        """LM Studio knows two types; a reranker is one of them."""
        if model.kind != "reranker":
            return model.kind
        return str(self._faults.look("reranker_listed_as", model.key))

    def copies(self, model: SimModel) -> list[Instance]:
        return [instance for instance in self.instances.values() if instance.model is model]

    def loads_of(self, model: SimModel) -> list[Load]:
        return [load for load in self.loads.values() if load.model is model]

    def listed(self, instance: Instance) -> bool:
        return self._clock.now() >= instance.listed_at

    def holds(self, instance: Instance) -> bool:
        return self.instances.get(instance.id) is instance

    def loaded(self, kind: str) -> list[SimModel]:
        return list({i.model.key: i.model for i in self.instances.values() if i.model.kind == kind}.values())

    # loading

    def start_load(
        self,
        model: SimModel,
        owner: Owner,
        take: Callable[[str], Value],
        *,
        ttl_seconds: float | None = None,
        context_length: int | None = None,
        config: Mapping[str, object] | None = None,
        seconds: float | None = None,
        identifier: str | None = None,
        variant: str | None = None,
    ) -> Load:
        own = float(take("load_seconds"))
        load = Load(
            instance_id=identifier or self._free_id(model, variant),
            model=model,
            variant=variant or model.variant,
            owner=owner,
            context_length=context_length or model.usual_context_length,
            config=dict(config or {}),
            ttl_seconds=ttl_seconds,
            seconds=seconds if seconds is not None else model.load_seconds if own < 0 else own,
            result=str(take("load_result")),
            reason=str(take("load_fail_reason")),
            lag_seconds=float(take("listing_lag_seconds")),
            drops_after=float(take("drops_after_seconds")),
            asked_at=self._clock.now(),
        )
        copies = len(self.copies(model)) + len(self.loads_of(model))
        self.loads[load.instance_id] = load
        self.first_looks[model.key] = True
        self._journal.write(Happened.LOAD_STARTED, **_named(load), copies=copies)
        if owner == "jit":
            self._evict_others(load)
        self._begin_loads()
        return load

    def _free_id(self, model: SimModel, variant: str | None) -> str:
        named = variant is not None and self._faults.look("variant_ids", model.key) == "variant"
        name = variant if variant is not None and named else model.key
        taken = self.instances.keys() | self.loads.keys()
        if name not in taken:
            return name
        n = 2
        while f"{name}:{n}" in taken:
            n += 1
        return f"{name}:{n}"

    def _begin_loads(self) -> None:
        for load in list(self.loads.values()):
            if load.started_at is not None or load.ended:
                continue
            others = [
                x for x in self.loads.values() if x.started_at is not None and x.model is not load.model
            ]
            if others and not self._faults.flag("loads_in_parallel"):
                continue
            load.started_at = self._clock.now()
            if load.result == "guardrail" or not self._fits(load):
                load.refused = True
                self._fail_load(load, GUARDRAIL)
            elif load.result == "stuck":
                pass  # at 0 %, for ever: seen in reality, and ended only by a restart
            elif load.seconds <= 0:
                self._finish_load(load)
            else:
                load.timer = self._clock.call_later(load.seconds, partial(self._finish_load, load))

    def _fits(self, load: Load) -> bool:
        return load.context_length <= load.model.max_context_length and self._within_limit(load.model, ())

    def estimate_factor(self, model: SimModel) -> float:
        return self._faults.number("estimate_factor", model.key)

    def has_room(self, model: SimModel) -> bool:
        """What the guardrails would say to a load of it."""
        return self._within_limit(model, (model,))

    def _within_limit(self, asked: SimModel, more: tuple[SimModel, ...]) -> bool:
        limit = int(self._faults.number("memory_bytes", asked.key))
        loaded = sum(instance.model.size_bytes + instance.grown for instance in self.instances.values())
        loading = [other.model for other in self.loads.values() if other.started_at is not None]
        return limit <= 0 or self._lost + loaded + sum(m.size_bytes for m in (*loading, *more)) <= limit

    def _finish_load(self, load: Load) -> None:
        if load.result == "fail":
            self._fail_load(load, load.reason)
            return
        now = self._clock.now()
        instance = Instance(
            id=load.instance_id,
            model=load.model,
            variant=load.variant,
            owner=load.owner,
            context_length=load.context_length,
            config=load.config,
            ttl_seconds=load.ttl_seconds,
            loaded_at=now,
            listed_at=now + load.lag_seconds,
            load_seconds=0.0 if load.started_at is None else now - load.started_at,
        )
        del self.loads[load.instance_id]
        self.instances[instance.id] = instance
        load.instance = instance
        self._journal.write(Happened.LOAD_ENDED, **_named(load), seconds=round(instance.load_seconds, 3))
        if load.owner == "jit":
            self._evict_others(load)  # another one may have come in while this one was loading
        self._arm_expiry(instance)
        if load.drops_after >= 0:
            self._clock.call_later(load.drops_after, partial(self._drop, instance))
        self._load_over(load)

    def _fail_load(self, load: Load, reason: str) -> None:
        del self.loads[load.instance_id]
        load.failure = reason
        self._journal.write(Happened.LOAD_FAILED, **_named(load), reason=reason)
        self._load_over(load)

    def cancel_load(self, load: Load) -> None:
        if load.ended:
            return
        self.loads.pop(load.instance_id, None)
        load.failure = CANCELLED
        self._journal.write(Happened.LOAD_CANCELLED, **_named(load))
        self._load_over(load)

    def _load_over(self, load: Load) -> None:
        if load.timer is not None:
            load.timer.cancel()
        for call in load.waiters:
            call.wake()
        self._begin_loads()

    # leaving memory

    def _evict_others(self, load: Load) -> None:
        if not self._faults.flag("auto_evict"):
            return
        for instance in list(self.instances.values()):
            # Copies of the same model stay together: that is how `:2 :3 :4` came about in reports.
            if instance.owner == "jit" and instance.model is not load.model:
                self.evict(instance, by=load.instance_id)

    def evict(self, instance: Instance, by: str) -> None:
        self._journal.write(Happened.EVICTED, **_named(instance), by=by, **_work(instance))
        self._lose(instance, UNLOADED_IN_QUEUE, UNLOADED)

    def unload(self, instance: Instance, by: str) -> None:
        self._journal.write(Happened.UNLOADED, **_named(instance), by=by, **_work(instance))
        self._lose(instance, UNLOADED_IN_QUEUE, UNLOADED)

    def crash(self, instance: Instance, stays_listed: bool) -> None:
        work = _work(instance)
        self._journal.write(Happened.CRASHED, **_named(instance), stays_listed=stays_listed, **work)
        if stays_listed:
            instance.crashed = True
            self._break_off(instance, CRASH, CRASH)
        else:
            self._lose(instance, CRASH, CRASH)

    def _drop(self, instance: Instance) -> None:
        if self.holds(instance):
            self.crash(instance, stays_listed=False)

    def grow(self, instance: Instance) -> None:
        """It answers, and takes more for that."""
        instance.grown += int(self._faults.number("growth_bytes", instance.model.key))
        if not self._within_limit(instance.model, ()):
            self._drop(instance)

    def revive(self, instance: Instance) -> None:
        if self.holds(instance) and instance.crashed:
            instance.crashed = False
            self._journal.write(Happened.RELOADED, **_named(instance))

    def _lose(self, instance: Instance, queued: str, working: str) -> None:
        del self.instances[instance.id]
        self._lost += int((instance.model.size_bytes + instance.grown) * self._faults.number("fragmentation"))
        if not self.instances and not self.loads:
            self._lost = 0
        if instance.expiry is not None:
            instance.expiry.cancel()
        self._break_off(instance, queued, working)

    def _break_off(self, instance: Instance, queued: str, working: str) -> None:
        losses = [(call, queued) for call in instance.queue]
        losses += [(call, working) for call in instance.working.values()]
        instance.queue.clear()
        instance.working.clear()
        for call, message in losses:
            if message != CRASH and self._faults.flag("unload_hangs_requests", instance.model.key):
                call.leave_hanging()
            else:
                call.fail(broken_off(call, message))

    def forget_all(self) -> None:
        """A restart: whoever waited is cut off by the studio, not told."""
        for instance in self.instances.values():
            if instance.expiry is not None:
                instance.expiry.cancel()
        for load in self.loads.values():
            if load.timer is not None:
                load.timer.cancel()
            load.failure = "restarted"
        self.instances.clear()
        self.loads.clear()
        self._lost = 0
        self.first_looks.clear()

    # working and idling

    def enter(self, instance: Instance, call: Guest) -> None:
        """Take a slot, or a place in the queue; `call.granted` says which, and the call is woken when it
        changes."""
        call.instance = instance
        instance.queue.append(call)
        call.phase = "queued"
        if instance.expiry is not None:
            instance.expiry.cancel()
        if self._faults.look("idle_starts") == "start":
            instance.last_used = self._clock.now()
        self._grant(instance)

    def _grant(self, instance: Instance) -> None:
        usual = int(self._faults.number("parallel", instance.model.key))
        parallel = instance.config.get("parallel", usual)
        while instance.queue and isinstance(parallel, int) and len(instance.working) < parallel:
            call = instance.queue.popleft()
            instance.working[call.n] = call
            call.granted = True
            call.wake()
            if self._faults.look("growth_bytes", instance.model.key):
                self._clock.call_later(0.0, partial(self.grow, instance))

    def leave(self, call: Guest) -> None:
        instance = call.instance
        if instance is None:
            return
        call.instance = None
        if call.slot is not None:
            call.slot.taken = False
        if call in instance.queue:
            instance.queue.remove(call)
        instance.working.pop(call.n, None)
        if not self.holds(instance):
            return
        if self._faults.look("idle_starts") == "end":
            instance.last_used = self._clock.now()
        self._grant(instance)
        self._arm_expiry(instance)

    def touch_all(self) -> None:
        for instance in self.instances.values():
            instance.last_used = self._clock.now()

    def _arm_expiry(self, instance: Instance) -> None:
        if instance.ttl_seconds is None or instance.working or instance.queue:
            return
        if instance.expiry is not None:
            instance.expiry.cancel()
        since = instance.loaded_at if instance.last_used is None else instance.last_used
        instance.expiry = self._clock.call_at(since + instance.ttl_seconds, lambda: self._expire(instance))

    def _expire(self, instance: Instance) -> None:
        if not self.holds(instance) or instance.ttl_seconds is None:
            return
        if instance.idle_seconds(self._clock.now()) < instance.ttl_seconds - 0.01:
            self._arm_expiry(instance)  # a listing touched it, under gets_reset_ttl
            return
        idle = round(instance.idle_seconds(self._clock.now()), 3)
        self._journal.write(Happened.EXPIRED, **_named(instance), idle_seconds=idle)
        self._lose(instance, UNLOADED_IN_QUEUE, UNLOADED)

    def _faults_changed(self, names: list[str]) -> None:
        if "parallel" in names:
            for instance in self.instances.values():
                self._grant(instance)
        if "loads_in_parallel" in names:
            self._begin_loads()


def _named(thing: Instance | Load) -> dict[str, object]:
    ident = thing.id if isinstance(thing, Instance) else thing.instance_id
    return {"model": thing.model.key, "instance_id": ident, "owner": thing.owner}


def _work(instance: Instance) -> dict[str, int]:
    return {"generating": len(instance.working), "queued": len(instance.queue)}

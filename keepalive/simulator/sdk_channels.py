"""What takes its time on the SDKs' sockets: loads with their progress, predictions, embeddings.

A `loadModel` is always a new copy, as over HTTP; a `getOrLoad` is a load on demand: it has an idle timer, throws out
others of its kind, and takes no notice of a load by other means.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from keepalive.simulator.call import Call
from keepalive.simulator.memory import CANCELLED
from keepalive.simulator.models import Instance, Load, SimModel
from keepalive.simulator.sdk_rows import (
    SdkRefusal,
    configured,
    field,
    find,
    instance_row,
    model_row,
    no_such_model,
    path_of,
)
from keepalive.simulator.speech import words
from keepalive.simulator.turn import process_prompt, work_on

Send = Callable[[dict[str, Any]], Awaitable[None]]

#: Between two messages of progress; 113 were counted for one load of 7 s.
STEP_SECONDS = 0.06


class Channel:
    """One of them. Whoever opened it may cancel it."""

    def __init__(self, call: Call, kind: str, send: Send) -> None:
        self.call = call
        self._kind = kind
        self._send = send
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self.call.wake()

    async def run(self, endpoint: str, parameter: Any) -> None:
        match endpoint:
            case "loadModel":
                await self._load_model(parameter)
            case "getOrLoad":
                await self._get_or_load(parameter)
            case "predict" | "completeRawText":
                await self._predict(parameter)
            case _:
                raise SdkRefusal(f"No endpoint {endpoint}")

    # loads

    async def _load_model(self, parameter: Any) -> None:
        call = self.call
        model = self._on_disk(field(parameter, "modelKey"))
        memory = call.machine.memory
        identifier = field(parameter, "identifier")
        if identifier in memory.instances.keys() | memory.loads.keys():
            raise SdkRefusal(f'A model with the identifier "{identifier}" is already loaded')
        await self._send({"type": "resolved", "info": model_row(memory, model)})
        ttl = field(parameter, "ttlMs")
        load = memory.start_load(
            model,
            "by hand",
            call.fault,
            ttl_seconds=ttl / 1000 if isinstance(ttl, (int, float)) else None,
            context_length=self._context(parameter),
            config=_config(parameter),
            identifier=identifier,
            variant=memory.variant(model, field(parameter, "modelKey")),
        )
        instance = await self._loaded(load, "progress")
        if instance is not None:
            await self._send({"type": "success", "info": instance_row(call.machine, instance)})

    async def _get_or_load(self, parameter: Any) -> None:
        call = self.call
        asked = field(parameter, "identifier")
        memory = call.machine.memory
        instance = memory.instances.get(asked) if isinstance(asked, str) else None
        if instance is None:
            model = self._on_disk(asked)
            instance = next(iter(memory.copies(model)), None)
        if instance is not None:
            call.key = instance.model.key
            await self._send({"type": "alreadyLoaded", "info": instance_row(call.machine, instance)})
            return
        running = [load for load in memory.loads_of(model) if load.owner == "jit"]
        evicted = [one for one in memory.instances.values() if one.owner == "jit"]
        if running and not call.flag("jit_stampede"):
            load = running[0]
        else:
            load = memory.start_load(
                model,
                "jit",
                call.fault,
                ttl_seconds=self._lease(parameter),
                context_length=self._context(parameter),
                variant=memory.variant(model, asked),
            )
        info = model_row(memory, model)
        await self._send({"type": "startLoading", "identifier": load.instance_id, "info": info})
        for other in evicted:
            if not memory.holds(other):
                info = instance_row(call.machine, other)
                await self._send({"type": "unloadingOtherJITModel", "info": info})
        instance = await self._loaded(load, "loadProgress")
        if instance is not None:
            await self._send({"type": "loadSuccess", "info": instance_row(call.machine, instance)})

    def _on_disk(self, asked: Any) -> SimModel:
        memory = self.call.machine.memory
        model = memory.find(asked) if isinstance(asked, str) else None
        if model is None:
            model = next((one for one in memory.models.values() if path_of(one) == asked), None)
        if model is None:
            title = f'Cannot find a model with path "{asked}"'
            raise SdkRefusal(
                title, "generic.pathNotFound", path=asked, availablePathsSample=[], totalModels=0
            )
        if memory.listed_kind(model) != self._kind:
            raise SdkRefusal(f'Model "{model.key}" is of another domain', "generic.domainMismatch")
        self.call.asked = asked
        self.call.key = model.key
        return model

    def _context(self, parameter: Any) -> int | None:
        found = configured(field(parameter, "loadConfigStack"), f"{self._kind}.load.contextLength")
        return found if isinstance(found, int) else None

    def _lease(self, parameter: Any) -> float | None:
        if not self.call.flag("jit_expires"):
            return None
        ttl = field(parameter, "loadTtlMs")
        return ttl / 1000 if isinstance(ttl, (int, float)) else self.call.number("default_ttl_seconds")

    async def _loaded(self, load: Load, told_as: str) -> Instance | None:
        """The instance, once it is there; None where its caller did not want it any more."""
        call = self.call
        call.phase = "loading"
        call.load = load
        load.waiters.append(call)
        step = max(STEP_SECONDS, load.seconds / 100)
        heeded = call.word("sdk_cancel") != "ignored"
        while not await call.until(lambda: load.ended or (self._cancelled and heeded), within=step):
            progress = load.progress(call.machine.clock.now())
            await self._send({"type": told_as, "progress": progress})
        call.load = None
        if not load.ended:
            load.waiters.remove(call)
            if not load.waiters:
                call.machine.memory.cancel_load(load)
            if call.word("sdk_cancel") == "errors":
                raise SdkRefusal(CANCELLED)
            return None
        if load.instance is None:
            raise SdkRefusal(f'Failed to load model "{load.model.key}". Error: {load.failure}')
        return load.instance

    # answers

    async def _predict(self, parameter: Any) -> None:
        call = self.call
        instance = await _turn(call, parameter, self._prompted)
        stack = field(parameter, "predictionConfigStack")
        limit = configured(stack, "llm.prediction.maxPredictedTokens")
        count = max(0, int(call.number("answer_tokens")))
        stop = "eosFound"
        if isinstance(limit, int) and 0 < limit <= count:
            count, stop = limit, "maxPredictedTokensReached"
        for n, word in enumerate(words(count, call.word("answer_text"), call.flag("multibyte_words"))):
            await call.pause(call.number("token_seconds") if n else 0.0)
            if self._cancelled:
                stop = "userStopped"
                break
            call.tokens += 1
            fragment = {
                "content": word,
                "tokensCount": 1,
                "containsDrafted": False,
                "reasoningType": "none",
                "isStructural": False,
            }
            await self._send({"type": "fragment", "fragment": fragment})
        call.generation_ended("ok")
        await self._send(
            {
                "type": "success",
                "stats": {"stopReason": stop, "predictedTokensCount": call.tokens},
                "modelInfo": instance_row(call.machine, instance),
                "loadModelConfig": {"fields": []},
                "predictionConfig": {"fields": []},
            }
        )

    async def _prompted(self, progress: float) -> None:
        await self._send({"type": "promptProcessingProgress", "progress": progress})


def _config(parameter: Any) -> dict[str, object]:
    """The settings of a load that the listing shows, by the listing's names."""
    stack = field(parameter, "loadConfigStack")
    names = {
        "llm.load.llama.evalBatchSize": "eval_batch_size",
        "llm.load.llama.flashAttention": "flash_attention",
        "llm.load.numExperts": "num_experts",
        "llm.load.numParallelSessions": "parallel",
        "llm.load.offloadKVCacheToGpu": "offload_kv_cache_to_gpu",
    }
    return {name: found for key, name in names.items() if (found := configured(stack, key)) is not None}


async def embed_string(call: Call, parameter: Any) -> dict[str, Any]:
    await _turn(call, parameter)
    call.generation_ended("ok")
    return {"embedding": [round(0.01 * (n + 1), 4) for n in range(8)]}


async def _turn(
    call: Call, parameter: Any, prompted: Callable[[float], Awaitable[None]] | None = None
) -> Instance:
    """The instance that was asked, when it has come to this request and read its prompt."""
    instance = find(call.machine.memory, field(parameter, "modelSpecifier"))
    if instance is None:
        raise no_such_model()
    call.asked = instance.id
    await work_on(call, instance)
    if prompted is not None:
        await prompted(0.0)
    await process_prompt(call, instance, call.number("prompt_seconds"))
    if prompted is not None:
        await prompted(1.0)
    return instance

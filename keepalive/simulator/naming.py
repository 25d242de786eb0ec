"""Who is meant: from the name in a request to the instance that answers, or to the model that must be loaded for it.

The rules as measured on 0.4.25; 0.3.x said 404 where 0.4 says 400.
"""

from keepalive.simulator.call import Call
from keepalive.simulator.exchange import Refusal, native_error, openai_error
from keepalive.simulator.models import Instance, SimModel

NOTHING_LOADED = "No models loaded. Please load a model in the developer page or use the 'lms load' command."
SEVERAL_LOADED = "Multiple models are loaded. Please specify a model by providing a 'model' field."


def resolve(call: Call, kind: str) -> Instance | SimModel:
    """The instance that will answer, or the model on disk that has to be loaded for it."""
    asked = call.payload.get("model")
    if asked is None:
        target: Instance | SimModel | None = _the_only_one(call, kind)
    elif not isinstance(asked, str) or not asked:
        shown = asked if isinstance(asked, str) else ""
        raise openai_error(400, f'Invalid model identifier "{shown}"', param="model", code="model_not_found")
    else:
        target = _named(call, asked)
    if target is None:
        return _stand_in(call, str(asked), kind)
    return _of_kind(target, call, kind)


def _the_only_one(call: Call, kind: str) -> Instance:
    """No model named: E6 and E7 where there is not just one that could be meant."""
    memory = call.machine.memory
    loaded = memory.loaded("reranker" if kind == "reranker" else "llm")
    if len(loaded) == 1:
        return memory.copies(loaded[0])[0]
    message = SEVERAL_LOADED if loaded else NOTHING_LOADED
    raise openai_error(_not_here(call), message, code="model_not_found")


def _named(call: Call, asked: str) -> Instance | SimModel | None:
    memory = call.machine.memory
    model = memory.find(asked)
    if model is not None:
        call.variant = memory.variant(model, asked)
        wanted = call.variant or (model.variant if call.flag("key_means_selected") else None)
        copies = [copy for copy in memory.copies(model) if wanted in (None, copy.variant)]
        if copies:
            # A bare key goes to the oldest copy, in any letter case. `key:2` is no key, so it falls through.
            return copies[0]
    if asked in memory.instances:
        return memory.instances[asked]
    return model if _loads_on_demand(call) else None


def _stand_in(call: Call, asked: str, kind: str) -> Instance:
    """A name that is nobody's here: another model may answer to it."""
    memory = call.machine.memory
    if call.route == "native_chat" or call.machine.tier == "openai":
        raise unknown_model(call, asked)  # measured: no fallback to another model here
    if not memory.instances and not _loads_on_demand(call):
        raise openai_error(_not_here(call), NOTHING_LOADED, code="model_not_found")  # E6
    loaded = memory.loaded("llm")
    if kind == "llm" and len(loaded) == 1 and call.flag("wrong_model_fallback"):
        return memory.copies(loaded[0])[0]
    raise unknown_model(call, asked)


def _loads_on_demand(call: Call) -> bool:
    return call.machine.tier == "openai" or call.flag("jit")


def _not_here(call: Call) -> int:
    return 404 if call.machine.tier == "v0" else 400


def not_stored(call: Call, ident: str, param: str) -> Refusal:
    """A response id that is nobody's here, or no longer."""
    status = int(call.number("stored_error_status"))
    message = f"Previous response with id '{ident}' not found."
    if call.route == "native_chat":
        return native_error(status, "invalid_request", message, param=param)
    return openai_error(status, message, param=param, code="previous_response_not_found")


def _of_kind(target: Instance | SimModel, call: Call, kind: str) -> Instance | SimModel:
    model = target.model if isinstance(target, Instance) else target
    call.key = model.key
    if model.kind == kind:
        return target
    names = {"embedding": "an embedding model", "reranker": "a reranker"}
    what = names[model.kind] if kind == "llm" else f"not {names[kind]}"  # E19
    message = f'Model "{model.key}" is {what}.'
    if call.route == "native_chat":
        raise native_error(400, "invalid_request", message, param="model")
    raise openai_error(400, message, param="model", code=None)


def unknown_model(call: Call, asked: str) -> Refusal:
    """E4, and E5 on the native route."""
    examples = ", ".join(list(call.machine.memory.models)[:2])
    message = (
        f'Invalid model identifier "{asked}". Please specify a valid downloaded model (e.g., {examples}).'
    )
    if call.route in ("native_chat", "load", "unload", "download"):
        return native_error(404, "model_not_found", message, code="model_not_found", param="model")
    if call.machine.tier == "openai":
        return openai_error(404, f"The model `{asked}` does not exist.", code="404", kind="NotFoundError")
    return openai_error(400, message, param="model", code="model_not_found")

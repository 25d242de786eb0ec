"""What is spoken on LM Studio's routes, and nothing of who speaks it. Pure.

    routes     which route a request is for
    asked      which model its body names, and which conversation it goes on with
    openings   what chats begin with, and how it is replayed
    renamed    a body with another name for its model
    joined     what LM Studio would say to a load
    listings   several listings of models as one
    toplevel   the top level of a JSON object that is too large to be parsed
    encodings  a packed body, read beside it
    json_text  JSON as LM Studio's runtime reads it
    words      what is ours to say: errors and heartbeats, in the layout of the route
    answers    what an answer says: errors, and the events of a chat
    begun      a streamed response as far as it has come: its names, its count
    lost       answers that say that the model went away
    sse        server-sent events: where one ends, what it says, how one is written
    sdk        what LM Studio's own SDKs say on their WebSockets
    frames     WebSocket messages in bytes that pass through
    meter      what a user felt of a stream, told from its events

May import: core.
"""

import pytest

from keepalive.core.errors import Reason
from keepalive.protocols.lost import looks_lost


@pytest.mark.parametrize(
    ("status", "body", "reason", "retryable"),
    [
        (
            400,
            b'{"error":"The model has crashed without additional information. (Exit code: null)"}',
            "crashed",
            False,
        ),
        (500, b'{"error":{"message":"THE MODEL HAS CRASHED"}}', "crashed", False),
        (200, b'{"error":"The model has crashed"}', "crashed", False),
        (400, b'{"error":"Model was unloaded while the request was still in queue.."}', "unloaded", True),
        (400, b'{"error":{"message":"Model unloaded."}}', "unloaded", True),
        (400, b"Model is unloaded.", "unloaded", True),
        (404, b'{"error":"Failed to load model \\"x\\". Error: Operation canceled"}', "unloaded", True),
        (400, b'{"error":"Model reloaded."}', "unloaded", True),
        (400, b'{"error":{"code":400,"message":"model is not loaded"}}', "unloaded", True),
        (
            503,
            b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}',
            "loading",
            True,
        ),
        (503, b"The model is loading. Please wait.", "loading", True),
        (502, b"<html>502 Bad Gateway</html>", "other", True),
        (502, b"", "other", True),
        (
            503,
            b"<h1>503 Service Unavailable</h1>\nNo server is available to handle this request.",
            "other",
            True,
        ),
        (503, b"no available server\n", "other", True),
        (503, b"upstream connect error or disconnect/reset before headers", "other", True),
        (503, b"due to maintenance downtime or capacity\nproblems", "other", True),
        (530, b"error code: 1033", "other", True),
        (522, b"error code: 522", "other", True),
        (400, b'{"error":{"code":400,"message":"model name=x:q4 is not running"}}', "unloaded", True),
        (500, b"proxy error: Could not establish connection", "unloaded", True),
        (500, b"proxy error: Failed to read connection", "unloaded", False),
        (
            404,
            b'{"error":{"message":"No models loaded. Please load a model in the developer page or use the '
            b"'lms load' command.\"}}",
            "unloaded",
            True,
        ),
        (
            200,
            b'{"type":"error","error":{"type":"internal_error","message":"Model unloaded."}}',
            "unloaded",
            True,
        ),
    ],
)
def test_answers_that_say_the_model_went_away_are_understood(status, body, reason, retryable):
    lost = looks_lost(status, body)

    assert lost is not None
    assert (lost.reason, lost.retryable) == (Reason(reason), retryable)
    assert looks_lost(status, body.upper()) == lost or b'"ERROR"' in body.upper()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b'{"choices":[{"message":{"content":"The model has crashed"}}]}'),
        (200, b"The model has crashed"),
        (200, b"proxy error: Could not establish connection"),
        (500, b'{"error":{"code":500,"message":"model name=x failed to load","type":"server_error"}}'),
        (200, b'{"error":null,"output":"Model unloaded."}'),
        (400, b'{"error":{"message":"Invalid model identifier \\"x\\"."}}'),
        (400, b'{"error":{"message":"Failed to load model \\"x\\". Error: insufficient system resources"}}'),
        (400, b'{"error":{"message":"the prompt exceeds the context length"}}'),
        (500, b"<html>Internal Server Error</html>"),
        (503, b'{"error":"Model is overloaded"}'),
        (400, b'{"error":{"message":"MCP server files is not running"}}'),
        (503, b"<html>503 Service Temporarily Unavailable</html>"),
        (504, b"<html>504 Gateway Time-out</html>"),
        (502, b'{"error":{"message":"the engine said something odd"}}'),
        (503, b'{"error":"Error loading model. (Exit code: 1)"}'),
        (400, b'{"error":{"message":"Loading model"}}'),
        (500, b"\xff\xfe"),
        (500, b""),
        (500, b"[" * 100_000),
    ],
)
def test_other_answers_say_nothing_about_the_model(status, body):
    assert looks_lost(status, body) is None


def test_of_a_name_that_it_was_asked_for_lm_studio_knows_nothing_while_that_is_not_in_memory():
    said = b'{"error":{"message":"Invalid model identifier \\"Acme/X\\". Write a valid one (e.g., \\"acme/y\\")."}}'

    lost = looks_lost(400, said, "acme/X")

    assert lost is not None
    assert (lost.reason, lost.retryable) == (Reason.UNLOADED, True)
    assert [looks_lost(400, said, name) for name in ("acme/y", "x", "", None)] == [None] * 4

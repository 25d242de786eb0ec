"""What a frame of LM Studio's SDKs costs on its way through the tunnel: `python benchmarks/frames.py`.

The real daemon, as a process of its own, between a WebSocket that tells fragments of an answer and one that hears them,
over loopback. CPU is what the kernel counts for the daemon alone. Nothing here fails on a slow machine.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import aiohttp
from aiohttp import web

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
A_SECOND = 1_000
CONFIG = """
[server]
listen = "127.0.0.1:0"
admin_listen = "127.0.0.1:0"
log_format = "json"
[[upstreams]]
url = "{url}"
sdk = "off"
[[models]]
key = "gemma"
"""
FRAGMENT = {"content": " word", "tokensCount": 1, "containsDrafted": False, "reasoningType": "none"}
MESSAGE = json.dumps(
    {"type": "channelSend", "channelId": 1, "message": {"type": "fragment", "fragment": FRAGMENT}},
    separators=(",", ":"),
)


async def upstream(request: web.BaseRequest) -> web.StreamResponse:
    """A number asks for so many fragments."""
    if request.headers.get("Upgrade", "").lower() != "websocket":
        return web.json_response({"models": []})
    tunnel = web.WebSocketResponse(compress=False)
    await tunnel.prepare(request)
    loop = asyncio.get_running_loop()
    async for asked in tunnel:
        began = loop.time()
        for number in range(int(asked.data)):
            await tunnel.send_str(MESSAGE)
            if (ahead := began + number / A_SECOND - loop.time()) > 0:
                await asyncio.sleep(ahead)
    return tunnel


async def hear(url: str, count: int) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as tunnel:
        await tunnel.send_str(str(count))
        for _ in range(count):
            await tunnel.receive_str()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


async def measure(seconds: float, callers: int) -> None:
    runner = web.ServerRunner(web.Server(upstream), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.toml")
        config.write_text(CONFIG.format(url=f"http://127.0.0.1:{runner.addresses[0][1]}"))
        command = [sys.executable, "-m", "keepalive", "run", "-c", str(config)]
        environ = {**os.environ, "XDG_STATE_HOME": folder}
        daemon = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE, env=environ)
        assert daemon.stderr is not None
        try:
            while (event := json.loads(await daemon.stderr.readline()))["event"] != "daemon.started":
                pass
            drain = asyncio.create_task(daemon.stderr.read())
            url = event["listen"].replace("http", "ws", 1) + "/llm"
            await hear(url, A_SECOND)
            count = int(seconds * A_SECOND)
            before = cpu_seconds(daemon.pid)
            await asyncio.gather(*(hear(url, count) for _ in range(callers)))
            spent = cpu_seconds(daemon.pid) - before
        finally:
            daemon.terminate()
            await daemon.wait()
        await drain
    await runner.cleanup()
    print(f"{callers} callers, {A_SECOND} frames a second each, {len(MESSAGE)} bytes a message")
    print(f"CPU per frame  {1e6 * spent / (count * callers):.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a frame of LM Studio's SDKs costs in the tunnel.")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long frames flow")
    parser.add_argument("--callers", type=int, default=2, help="how many callers hear them")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.seconds, arguments.callers))


if __name__ == "__main__":
    main()

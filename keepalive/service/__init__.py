"""The daemon: builds every part, wires it, runs it, stops it. The only floor that sees the whole config.

May import: admin, prompts, observers, proxy, protocols, keeper, lmstudio, cluster, http1, config, core.
"""

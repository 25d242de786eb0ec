"""The tests that depend most on time, run many times on a machine that has none to spare: `make test-timely`.

Real sockets, processes, signals, heartbeats: what fails here now and then judges by the wall clock, or by how often
something happened to run. `python tests/kit/timely.py [TIMES] [pytest's arguments]`.
"""

import os
import subprocess
import sys
from pathlib import Path

TIMES = 20
TESTS = (
    "tests/admin/test_server.py",
    "tests/cli/test_app.py",
    "tests/http1/test_listener.py",
    "tests/kit/test_raw.py",
    "tests/lmstudio/test_client.py",
    "tests/observers/test_feed.py",
    "tests/proxy/test_callers.py::test_c2_leaving_is_noticed_in_every_phase_and_the_upstream_told",
    "tests/proxy/test_callers.py::test_c2_forty_instants",
    "tests/proxy/test_callers.py::test_c4_who_does_not_read_slows_the_upstream_and_costs_little",
    "tests/proxy/test_callers.py::test_d3_stopping_ends_streams_with_an_error_event_and_refuses_new_ones",
    "tests/proxy/test_faults.py::test_a_silent_upstream_does_not_slow_the_others",
    "tests/proxy/test_faults.py::test_an_upstream_that_answers_without_reading_is_heard",
    "tests/proxy/test_faults.py::test_u1_the_upstream_died_and_the_keeper_knows_it_after_the_first_try",
    "tests/proxy/test_held.py",
    "tests/proxy/test_limits.py::test_c5_five_hundred_who_drip_keep_nobody_waiting_and_are_cut_off",
    "tests/proxy/test_limits.py::test_m16_a_daemon_that_has_run_out_of_files_says_so_once_and_recovers",
    "tests/proxy/test_limits.py::test_no_stream_no_silence_and_no_tunnel_is_ended_by_the_clock",
    "tests/proxy/test_tunnel.py",
    "tests/service/test_daemon.py",
    "tests/service/test_front.py",
    "tests/simulator/test_wire.py",
    "tests/test_client.py",
)
PROJECT = Path(__file__).parents[2]


def main(times: int, arguments: list[str]) -> int:
    cores = os.cpu_count() or 2
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(2 * cores), "--dist", "loadgroup"]
    try:
        for time in range(1, times + 1):
            print(f"{time} of {times}", flush=True)
            if code := subprocess.run([*command, *(arguments or TESTS)], cwd=PROJECT).returncode:
                return code
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return 0


if __name__ == "__main__":
    numbers, others = ([a for a in sys.argv[1:] if a.isdigit() is digit] for digit in (True, False))
    sys.exit(main(int(numbers[0]) if numbers else TIMES, others))

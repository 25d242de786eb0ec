"""Requests that follow real activity: `python benchmarks/memory/make_trace.py --per-day 80 > trace.csv`.

People come in sessions. Their arrivals follow the counts of `mentions.csv` (an inhomogeneous Poisson process, thinned
to so many sessions a day over all models). A session has a geometric number of requests (mean 6); each begins an
exponential pause (mean 45 s) after the one before it has been answered at its usual pace, and an answer takes a
log-normal time (sigma 0.6) around the model's median. The same seed gives the same trace on every machine.
"""

import argparse
import csv
import random
from pathlib import Path

HERE = Path(__file__).parent


def rows(name: str) -> list[dict[str, str]]:
    with (HERE / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def make_trace(per_day: float = 80, seed: int = 1) -> list[tuple[float, str, float]]:
    rng = random.Random(seed)
    median = {m["model"]: float(m["answer_seconds"]) for m in rows("models.csv")}
    counts = rows("mentions.csv")
    total = sum(int(float(row[m] or 0)) for row in counts for m in median)
    days = (float(counts[-1]["minute"]) - float(counts[0]["minute"])) / 1440
    per_count = per_day * days / total
    found = []
    for row in counts:
        for m in sorted(median):
            mean = int(float(row[m] or 0)) * per_count
            while True:  # arrivals in this slot of 300 s
                mean -= rng.expovariate(1.0)
                if mean < 0:
                    break
                t = float(row["minute"]) * 60 + rng.random() * 300
                while True:
                    answer = median[m] * rng.lognormvariate(0, 0.6)
                    found.append((round(t, 3), m, round(answer, 3)))
                    t += answer + rng.expovariate(1 / 45)
                    if rng.random() < 1 / 6:
                        break
    return sorted(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--per-day", type=float, default=80)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print("second,model,answer_seconds")
    for second, model, answer in make_trace(given.per_day, given.seed):
        print(f"{second},{model},{answer}")

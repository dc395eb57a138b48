"""The other side of serve.lua: answers the driver's lines with one line each."""
import sys
import time


def blocks(step, finish):
    """Each line `N` runs step() N times and answers `ms a step: mean, least`; `end` answers finish()."""
    for line in sys.stdin:
        word = line.strip()
        if word == "end":
            print(finish(), flush=True)
            return
        least, began = float("inf"), time.perf_counter()
        for _ in range(int(word)):
            t = time.perf_counter()
            step()
            least = min(least, time.perf_counter() - t)
        mean = (time.perf_counter() - began) / int(word)
        print(f"{mean * 1e3:.4f} {least * 1e3:.4f}", flush=True)


def rss():
    """Resident bytes of this process."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096

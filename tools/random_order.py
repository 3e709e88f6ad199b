"""Run the quick tests several times in random order while other processes use all cores: `make test-random`.

`python -m tools.random_order [TIMES]` prints a line per round and exits with 1 if a test failed in any round.
"""

import multiprocessing
import subprocess
import sys
import time


def keep_busy() -> None:
    """Use one core until the process is ended."""
    while True:
        pass


def main() -> int:
    """Run the rounds and return the exit code."""
    times, failed = int(sys.argv[1]) if len(sys.argv) > 1 else 5, 0
    # A busy machine delays processes and threads, which reveals tests that rely on their speed.
    busy = [multiprocessing.Process(target=keep_busy, daemon=True) for _ in range(multiprocessing.cpu_count())]
    for process in busy:
        process.start()
    for seed in range(1, times + 1):
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "randomly", f"--randomly-seed={seed}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        failed += done.returncode != 0
        last = done.stdout.strip().splitlines()[-1:] or ["no output"]
        print(f"seed {seed}: {last[0]} ({time.monotonic() - start:.0f} s)", flush=True)
        if done.returncode:
            print(done.stdout[-20000:], done.stderr[-5000:], flush=True)
    for process in busy:
        process.terminate()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

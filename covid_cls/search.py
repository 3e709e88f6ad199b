"""python -m covid_cls.search: replaced by a recipe of `covid_cls.train`; prints the new command."""

import shlex
import sys
from collections.abc import Sequence

_RENAMED = {
    "search.trials": "hydra.sweeper.n_trials",
    "search.seed": "hydra.sweeper.sampler.seed",
    "search.low": "hydra.sweeper.params.optimizer.lr",
    "search.high": "hydra.sweeper.params.optimizer.lr",
}


def main(words: Sequence[str]) -> int:
    """Print the command that replaces this one and return 2."""
    kept = [word for word in words if word.partition("=")[0] not in _RENAMED]
    command = shlex.join(["python", "-m", "covid_cls.train", "-m", "experiment=learning_rate", *kept])
    changed = [f"{old} is now {_RENAMED[old]}" for old in (word.partition("=")[0] for word in words) if old in _RENAMED]
    print(f"error: covid_cls.search was replaced by a recipe; run: {command}", file=sys.stderr)
    for line in changed:
        print(f"    {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

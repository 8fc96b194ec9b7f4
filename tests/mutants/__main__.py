"""Runs a sample of mutants and writes outcomes.json: `python -m tests.mutants [PART OF A MODULE'S NAME ...]`.

--sample 15 takes so many of each module, chosen by --seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from ..conftest import torch  # its settings
from ..documents import ROOT
from . import trial
from .mutate import Mutant, mutants
from .targets import TARGETS

sys.path.insert(0, str(ROOT / "benchmarks"))
from versions import versions

FILE = Path(__file__).with_name("outcomes.json")


def main() -> int:
    args = _arguments()
    found = json.loads(FILE.read_text()) if FILE.exists() else {"modules": {}}
    for module, tests in TARGETS.items():
        before = found["modules"].get(module, {})
        if not any(part in module for part in args.modules or [""]) or (args.survivors and not before.get("survivors")):
            continue
        trial.collect(tests)
        usual, seconds = trial.run(tests, limit=1200.0)
        assert usual == trial.SURVIVED, f"the tests of {module} fail on the code as it is"
        every = mutants(module, trial.path_of(module).read_text())
        chosen = random.Random(args.seed).sample(every, min(args.sample, len(every)))
        row = {"mutants": len(every), "sample": len(chosen), "seed": args.seed}
        if args.survivors:
            chosen, row = [each for each in every if _text(each) in before["survivors"]], before
        survivors = []
        for mutant in sorted(chosen, key=lambda each: each.number):
            outcome, took = trial.run(tests, 60.0 + 10 * seconds, mutant)
            print(f"{outcome:8} {took:5.0f} s  {module}: {_text(mutant)}", flush=True)
            survivors += [_text(mutant)] * (outcome == trial.SURVIVED)
        row |= {"survivors": survivors, "killed": row["sample"] - len(survivors)}
        found["modules"][module] = row
        found |= {key: value for key, value in versions("cpu").items() if key != "packages"}
        found["torch"] = torch.__version__
        FILE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(f"{module}: {row['killed']} of {row['sample']} killed ({len(every)} mutants)", flush=True)
    return 0


def _text(mutant: Mutant) -> str:
    return f"{mutant.function}, {mutant.change}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--sample", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", action="store_true", help="only those that are recorded, with the tests of now")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

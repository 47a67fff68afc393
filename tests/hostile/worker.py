"""A process that runs cases one after another: ``python -m tests.hostile.worker FOLDER``, case numbers on stdin.

It answers each with one line of JSON. Loading torch takes longer than most cases, so a process serves many.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import sys
from pathlib import Path


def main() -> None:
    root = Path(sys.argv[1])
    os.environ.update(HF_HUB_OFFLINE="1", WEFT_CACHE_DIR="", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    os.environ.update(HF_HOME=str(root / "good" / "hub"))
    sys.dont_write_bytecode = True
    from tests.hostile.corpus import CASES
    from tests.hostile.judge import Outcome, Watch, run
    from tests.hostile.kit import Place, ask, make_good, train

    answers, sys.stdout = sys.stdout, sys.stderr
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    good = make_good(root / "good")
    watch = Watch()
    warm = root / f"warm-{os.getpid()}"
    warm.mkdir()
    place = Place(warm, good)
    for words in (ask(place.run()), ask(place.model()), train(good.model, good.data)):
        run(watch, words, warm, [good.root])  # whatever is imported late
    shutil.rmtree(warm)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        case = CASES[int(line)]
        folder = root / f"case-{int(line)}"
        folder.mkdir()
        try:
            outcome = run(watch, case.build(Place(folder, good)), folder, [good.root])
            found = dataclasses.asdict(outcome)
        except BaseException as error:
            outcome = Outcome(-1, 0.0, 0.0, 0, [], f"{type(error).__name__}: {error}")
            found = dataclasses.asdict(outcome)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()

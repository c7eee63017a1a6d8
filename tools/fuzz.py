"""Random networks, pruned at random, each against its masked original: the long run of ``tests/fuzz``.

Networks are drawn and checked in chunks, each in a process of its own with a seed of its own, so that a
run is repeatable, holds no memory and can be taken up again at any chunk::

    python tools/fuzz.py --networks 5000
    python tools/fuzz.py --networks 100 --first 37      # chunk 37 alone

The last line is ``N networks, M failed``; the exit status is 1 where M is not 0. A failure is printed as
the network's steps with its error; it can be shrunk with ``IRPRUNE_FUZZ_SEED=CHUNK pytest tests/fuzz``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from multiprocessing.queues import SimpleQueue
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests")]

CHUNK = 100


def chunk(seed: int, count: int, answers: SimpleQueue[tuple[int, int, list[str]]]) -> None:
    """Draw and check networks; every failure is kept, none ends the chunk."""
    import hypothesis
    from fuzz_networks import Network, networks
    from hypothesis import strategies as st
    from test_fuzz import prune_and_prove

    warnings.simplefilter("ignore")
    done, pruned, failures = 0, 0, []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(networks(), st.data())
    def run(network: Network, data: st.DataObject) -> None:
        nonlocal done, pruned
        try:
            pruned += bool(prune_and_prove(network, data))
            done += 1
        except hypothesis.errors.HypothesisException:
            raise
        except Exception as error:
            done += 1
            failures.append(f"{network}: {type(error).__name__}: {error}")

    run()
    answers.put((done, pruned, failures))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=5000, help="how many networks are checked")
    parser.add_argument("--first", type=int, default=0, help="the number of the first chunk, which is its seed")
    options = parser.parse_args()
    context = multiprocessing.get_context("fork")
    from fuzz_networks import Network
    from test_fuzz import traced

    traced(Network(4, [], 4).double())  # what the first trace loads is shared by all chunks

    networks, pruned, failed, start = 0, 0, 0, time.monotonic()
    number = options.first
    while networks < options.networks:
        answers: SimpleQueue[tuple[int, int, list[str]]] = context.SimpleQueue()
        process = context.Process(target=chunk, args=(number, min(CHUNK, options.networks - networks), answers))
        process.start()
        process.join()
        if process.exitcode:
            failed += 1
            print(f"chunk {number} ended with status {process.exitcode}", flush=True)
            networks += CHUNK
        else:
            done, some, failures = answers.get()
            networks, pruned, failed = networks + done, pruned + some, failed + len(failures)
            for failure in failures:
                print(f"chunk {number}: {failure}", flush=True)
        print(
            f"chunk {number}: {networks} networks, {pruned} lost something, {failed} failed, {time.monotonic() - start:.0f} s", flush=True
        )
        number += 1
    print(f"{networks} networks, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

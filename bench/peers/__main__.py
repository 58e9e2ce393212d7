"""`make bench-peers`: the same work by other libraries, each with the Python of its own environment.

    python -m bench.peers [--environments .venv-peers] [the options of bench.run]

Each environment also times a plain forward without the library, as its own yardstick. The results are put beside
Vesalius's by `make bench` when it is given the same options.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from bench import suite

PEERS = ("transformer-lens", "nnsight")


def main() -> int:
    """Command line."""
    options = suite.parser(__doc__)
    options.add_argument("--environments", type=Path, default=suite.ROOT / ".venv-peers")
    options.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    args = options.parse_args()
    pythons = {peer: args.environments / peer / "bin" / "python" for peer in args.peers}
    for peer, python in pythons.items():
        if not python.exists():
            suite.say(f"no environment for {peer} at {python}; `make bench-peers` makes it")
            return 2
    work = suite.request(args)
    suite.refuse_if_busy(args.force)
    reports = []
    for peer, python in pythons.items():
        yardstick = suite.run("hooks", python, work, ["forward:late"], args.repeats)
        for report in suite.run(peer, python, work, args.jobs, args.repeats):
            if "wall_s" in yardstick[0]:
                report["plain_wall_s"] = yardstick[0]["wall_s"]
                report["plain_cpu_s"] = yardstick[0]["cpu_s"]
            reports.append(report)
    path = args.out / f"peers-{work.digest}.json"
    when = time.strftime("%Y-%m-%d %H:%M")
    path.write_text(json.dumps({"work": work.digest, "when": when, "reports": reports}, indent=1))
    suite.say(f"written to {path}; `make bench` shows it beside Vesalius")
    return 1 if any(r["status"] == "failed" for r in reports) else 0


if __name__ == "__main__":
    sys.exit(main())

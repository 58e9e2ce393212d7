"""`make bench`: the naive hook loop and Vesalius on the same work, with other libraries' results where there are any.

    python -m bench.run [--quick] [--device cuda] [--model FOLDER] [--out FOLDER]

Writes `bench.md` (printed too) and `bench.json` to the output folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench import suite, table


def peers(out: Path, digest: str, ours: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Results of `make bench-peers` for the same work on the same machine, and a line about them."""
    path = out / f"peers-{digest}.json"
    if not path.exists():
        other = " (there are results for other options)" if list(out.glob("peers-*.json")) else ""
        return [], f"No other library was timed on this work{other}: run `make bench-peers` first."
    found: dict[str, Any] = json.loads(path.read_text())
    mine = next((r for r in ours if "machine" in r), {})
    reports: list[dict[str, Any]] = found["reports"]
    if not all(suite.same_machine(r, mine) for r in reports if "machine" in r):
        return [], f"The results in {path.name} come from another machine and are left out."
    return reports, f"Other libraries: timed at {found['when']} on this machine, same prompts and weights."


def main() -> int:
    """Command line."""
    options = suite.parser(__doc__)
    options.add_argument("--engines", nargs="+", default=["hooks", "vesalius"], choices=["hooks", "vesalius"])
    args = options.parse_args()
    work = suite.request(args)
    suite.refuse_if_busy(args.force)
    reports = []
    for engine in args.engines:
        reports += suite.run(engine, Path(sys.executable), work, args.jobs, args.repeats)
    others, line = peers(args.out, work.digest, reports)
    text = table.render(work, reports + others, line)
    (args.out / "bench.md").write_text(text)
    (args.out / "bench.json").write_text(json.dumps({"work": work.digest, "reports": reports + others}, indent=1))
    print(text)
    return 1 if any(r["status"] == "failed" for r in reports) else 0


if __name__ == "__main__":
    sys.exit(main())

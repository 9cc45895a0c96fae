"""Makes the tables that are shipped with the package from a tuning store: the fastest configuration of every problem it has.

    python -m benchmarks.ship_table [--store DIR] [--to effllm/autotune/tables]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from effllm.autotune import tables
from effllm.autotune.store import Store


def main(argv: list[str] | None = None) -> int:
    """Write the tables and say what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="default: the store in the user's cache directory")
    parser.add_argument("--to", type=Path, default=tables.FOLDER)
    args = parser.parse_args(argv)
    store = Store(args.store)
    added = tables.keep_best(store, args.to)
    print(f"{added} problems added to {args.to} from {store.directory}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

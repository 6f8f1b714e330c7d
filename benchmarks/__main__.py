"""`python -m fastrm_benchmarks`, or `python -m benchmarks` in a checkout: `fastrm bench`."""

import sys

from fastrm.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))

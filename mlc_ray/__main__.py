"""`python -m mlc_ray`: the same as the `mlc-ray` command."""

import sys

from mlc_ray.cli import main

if __name__ == "__main__":  # workers that are spawned import this file too
    sys.exit(main())

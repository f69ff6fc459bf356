"""Makes the helpers of these tests, and those of the fault tests, importable (tests are imported without a package)."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "faults")]

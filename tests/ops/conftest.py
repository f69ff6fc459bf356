"""Makes helpers importable (tests are imported without a package): these tests', the fault tests', the gateway's."""

import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "faults"), str(_HERE.parent / "gateway")]

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "sim"))  # the fake runner serves several rooms' tests

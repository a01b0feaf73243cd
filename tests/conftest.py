import sys
from pathlib import Path

# Models of a user's own, as `--import` finds them on a server.
sys.path.insert(0, str(Path(__file__).parent / "system" / "models"))

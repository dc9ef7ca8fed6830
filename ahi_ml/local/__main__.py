"""``python -m ahi_ml.local FOLDER``: the server process of one folder, until nobody holds it."""

from __future__ import annotations

import sys
from pathlib import Path

from ahi_ml.local.serve import serve_folder

if __name__ == "__main__":
    sys.exit(serve_folder(Path(sys.argv[1])))

"""``python -m inlay.cli`` is ``inlay``; torchrun and accelerate launch use it too."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m checkpoint`."""

import sys

from .cli import main

sys.exit(main())

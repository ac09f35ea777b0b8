"""`python -m atma` is the command `atma`."""

import sys

from atma.cli import main

sys.exit(main())

"""`python -m remora`, the same as `remora`."""

import sys

from remora.cli import main

sys.exit(main())

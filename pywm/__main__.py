"""``python -m pywm`` is the command ``pywm``."""

from __future__ import annotations

import sys

from pywm.cli import main

sys.exit(main())

"""``python -m pywm`` is the command ``pywm``."""

from pywm.cli import main

raise SystemExit(main())

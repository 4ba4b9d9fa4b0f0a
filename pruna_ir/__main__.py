"""``python -m pruna_ir`` is ``pruna-opt``."""

import sys

from pruna_ir.cli.main import main

sys.exit(main())

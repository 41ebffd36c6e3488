"""`python -m jaxmodels` is `jaxmodels`."""

import sys

from jaxmodels.cli import main

sys.exit(main())

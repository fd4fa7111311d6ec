"""``python -m servecast.sim.cli``: the ``servecast`` command where its script is not on the path."""

import sys

from servecast.sim.cli import main

sys.exit(main())
